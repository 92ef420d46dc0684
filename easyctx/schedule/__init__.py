"""Schedules: who sends what when."""

from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.dist_flash import DistFlash
from easyctx.schedule.merge import Accumulator
from easyctx.schedule.ring import Ring
from easyctx.schedule.ulysses import Ulysses, check_heads
from easyctx.schedule.work import attend

__all__ = ["Accumulator", "Attention", "DistFlash", "Ring", "Schedule", "Ulysses", "attend", "check_heads"]
