"""Who runs in the next step, on which pages: requests in, step plans out.

Knows nothing of jax, models or text.
"""

from jaxserve.scheduler.buckets import BucketChooser, default_buckets
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.stats import GroupPages, SchedulerStats

__all__ = ["BucketChooser", "GroupPages", "Scheduler", "SchedulerStats", "default_buckets"]
