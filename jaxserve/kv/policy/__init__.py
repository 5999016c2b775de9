"""Which block leaves a full tier, and which may enter it."""

from jaxserve.kv.policy.base import Policy as Policy
from jaxserve.kv.policy.factory import check_policy as check_policy
from jaxserve.kv.policy.factory import make_policy as make_policy
