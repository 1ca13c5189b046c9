"""An inspection for programs that show findings of many tools: SARIF (code scanning) and JUnit (test results)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from rewrite.inspection.inspection import Inspection, severity_of
from rewrite.ledger.fault import SEVERITIES, Severity
from rewrite.loaders.outcome import merged
from rewrite.loaders.ranges import Engine
from rewrite.report.page import clean
from rewrite.version import __version__

_LEVELS: dict[Severity, str] = {"garbled": "error", "fails": "error", "precision": "warning", "unknown": "note"}
_RULES: dict[Severity, str] = {
    "garbled": "Weights are read wrong, and nothing says so",
    "fails": "It does not load or does not run",
    "precision": "Precision is lost",
    "unknown": "What an engine makes of it is not known",
}


@dataclass(frozen=True)
class Result:
    """What is to be said of one engine, or of one fault in the checkpoint; no severity: that all is well."""

    name: str
    severity: Severity | None
    text: str
    where: str = "config.json"


def results(found: Inspection, asked: Sequence[Engine]) -> Iterator[Result]:
    """The engines that were asked for, then the faults."""
    for name, versions, outcome in merged(found.rows, lambda row: row.as_is if row.engine in asked else None):
        if outcome is not None:
            parts = f": {', '.join(outcome.partitions)}" if outcome.partitions else ""
            why = f" ({outcome.detail})" if outcome.detail else ""
            text = clean(f"{name} {versions}: {outcome.kind}{parts}{why}")
            yield Result(f"{name} {versions}", severity_of(outcome), text)
    for finding in found.findings:
        shard, _, tensor = finding.where.partition(": ")
        text = clean(f"{finding.what}: {finding.where}")
        yield Result(clean(finding.what), finding.severity, text, shard if tensor else "config.json")


def sarif(found: Inspection, asked: Sequence[Engine], command: str | None) -> dict[str, Any]:
    """SARIF 2.1.0. ``command`` is what repairs it."""
    fix = "" if command is None else f" Repaired by: {command}"
    rules = [{"id": each, "shortDescription": {"text": _RULES[each]}} for each in SEVERITIES]
    said = [
        {
            "ruleId": each.severity,
            "level": _LEVELS[each.severity],
            "message": {"text": each.text + fix},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": clean(each.where)}}}],
        }
        for each in results(found, asked)
        if each.severity is not None
    ]
    driver = {"name": "rewrite", "version": __version__, "rules": rules}
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": said}],
    }


def junit(found: Inspection, asked: Sequence[Engine], level: Severity) -> str:
    """A test case for each engine and each fault; it fails where a gate that is set to ``level`` does, and is skipped
    where it is not known."""
    stopped = SEVERITIES[: SEVERITIES.index(level) + 1]
    suite = ElementTree.Element("testsuite", name="rewrite inspect")
    counts = {"tests": 0, "failures": 0, "skipped": 0}
    for each in results(found, asked):
        case = ElementTree.SubElement(suite, "testcase", classname=clean(found.path), name=each.name)
        counts["tests"] += 1
        if each.severity in stopped:
            counts["failures"] += 1
            ElementTree.SubElement(case, "failure", type=str(each.severity), message=each.text)
        elif each.severity == "unknown":
            counts["skipped"] += 1
            ElementTree.SubElement(case, "skipped", message=each.text)
    suite.attrib.update({name: str(number) for name, number in counts.items()})
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
