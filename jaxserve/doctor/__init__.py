"""Findings about a machine: what is there, what is missing, and what to do about it."""

import logging
from collections.abc import Callable, Sequence

from jaxserve.config import Config
from jaxserve.doctor.devices import device_findings
from jaxserve.doctor.finding import Finding
from jaxserve.doctor.host import host_findings
from jaxserve.doctor.packages import package_findings

__all__ = ["Finding", "examine"]


def examine(config: Config) -> list[Finding]:
    """All findings, by area; one that fails is itself a finding."""
    logging.disable(logging.WARNING)  # what they would say is in the findings
    findings: list[Finding] = []
    probes: Sequence[tuple[str, Callable[[], Sequence[Finding]]]] = (
        ("software", package_findings),
        ("device", lambda: device_findings(config)),
        ("host", lambda: host_findings(config)),
    )
    try:
        for area, probe in probes:
            try:
                findings += probe()
            except Exception as error:  # a doctor that dies helps nobody
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                findings.append(Finding(area, "check", "bad", text))
    finally:
        logging.disable(logging.NOTSET)
    return findings
