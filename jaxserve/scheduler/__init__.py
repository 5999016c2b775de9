"""Who runs in the next step, on which pages: requests in, step plans out.

Knows nothing of jax, models or text.
"""

from jaxserve.scheduler.buckets import default_buckets
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.stats import GroupPages, SchedulerStats

__all__ = ["GroupPages", "Scheduler", "SchedulerStats", "default_buckets"]
