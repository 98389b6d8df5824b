"""``distckpt doctor``: is this machine, or are these ranks, fit to train with exact gradients?"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from distckpt.cli.environment import (
    Place,
    device_findings,
    devices,
    installed,
    launch_findings,
    neighbour_findings,
    place,
    regions_work,
    torch_findings,
    versions,
)
from distckpt.cli.report import Finding, Section, lines, show, wrap
from distckpt.errors import BadEnvironment, RankMissing, ReplayDiffers

T = TypeVar("T")


class Ranks:
    """The ranks of one job. Alone, everything is immediate."""

    def __init__(self, place: Place, environment: Mapping[str, str], timeout: float) -> None:
        """Meets the store. Raises ``torch.distributed.DistNetworkError`` or ``DistStoreError`` when it cannot."""
        self.place = place
        self._timeout = timeout
        self._serves = False
        if place.size == 1:
            return
        # torchrun's agent serves a store already; under another launcher rank 0 does.
        self._serves = place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(
            place.address,
            place.port,
            None,
            self._serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"distckpt/doctor/{attempt}", store)

    def bring(self, mine: object) -> list[Any]:
        """Rank 0: what each rank brought, by rank, None for those that did not in time. Elsewhere: nothing."""
        if self.place.size == 1:
            return [mine]
        if self.place.rank != 0:
            self._store.set(f"found/{self.place.rank}", json.dumps(mine))
            return []
        end = time.monotonic() + self._timeout
        others = [self._wait(f"found/{rank}", end) for rank in range(1, self.place.size)]
        return [mine, *(None if text is None else json.loads(text) for text in others)]

    def follow(self, lead: Callable[[], T]) -> T:
        """Rank 0 runs ``lead``; every rank returns what it returned, and nobody leaves before it has.

        A launcher stops all ranks when the first one fails, so rank 0 must have printed by then.
        """
        if self.place.size == 1:
            return lead()
        if self.place.rank == 0:
            verdict = lead()
            self._store.set("verdict", json.dumps(verdict))
            if self._serves:
                end = time.monotonic() + 10
                for rank in range(1, self.place.size):
                    self._wait(f"left/{rank}", end)
            return verdict
        text = self._wait("verdict", time.monotonic() + 2 * self._timeout)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.place.rank}", "")
        return json.loads(text) if text is not None else 1  # type: ignore[return-value]

    def _wait(self, key: str, end: float) -> str | None:
        try:
            self._store.wait([key], timedelta(seconds=max(0.05, end - time.monotonic())))
            return self._store.get(key).decode()
        except RuntimeError:  # a timeout, or a store that went away with its rank
            return None


SCHEMA = "distckpt.doctor/1"


def doctor(options: Namespace, environment: Mapping[str, str] | None = None) -> int:
    """Look, self-test, print (rank 0 only). Returns the exit code: 0, or 1 when something failed, on every rank."""
    environment = os.environ if environment is None else environment
    torchs = torch_findings()
    entries = devices()
    here, ranks, found = _meet(environment, options.timeout)
    left_out = "as asked" if options.no_self_test else None
    if not regions_work():
        left_out = "regions need what this torch lacks"
    mine = [] if left_out else _self_test(options, entries, here)
    everyone = ranks.bring(mine)

    def report() -> int:
        counts = {e["type"]: e["count"] for e in entries if e["on"]}
        launch = launch_findings(environment, counts, installed("torch-xla"))
        if found is not None:
            launch = [f for f in launch if f.subject != found.subject] + [found]
        sections = {
            "torch": Section("Torch", tuple(torchs)),
            "devices": Section("Devices", tuple(device_findings(entries))),
            "launch": Section("Launch", tuple(launch)),
            "neighbours": Section("Neighbours", tuple(neighbour_findings(environment, options.imports))),
            "self_test": Section("Replay self-test", tuple(_verdicts(everyone, options, left_out))),
        }
        failures = sum(f.status == "fail" for s in sections.values() for f in s.findings)
        warnings = sum(f.status == "warn" for s in sections.values() for f in s.findings)
        if options.json:
            print(json.dumps(_as_json(entries, sections, everyone, failures, warnings), indent=2), flush=True)
        else:
            _print(sections, failures, warnings)
        return 1 if failures else 0

    return ranks.follow(report)


def _meet(environment: Mapping[str, str], timeout: float) -> tuple[Place, Ranks, Finding | None]:
    """This process among the ranks; alone, with the reason, where the environment does not let it be more."""
    alone = Place()
    try:
        here = place(environment)
        return here, Ranks(here, environment, timeout), None
    except BadEnvironment as error:
        return alone, Ranks(alone, environment, timeout), Finding.failed("torchrun", error)
    except RuntimeError as error:  # torch's DistError and its kin
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        refused = BadEnvironment(
            f"rank {environment['RANK']} cannot reach the store at {where}",
            why=str(error).splitlines()[0],
            fix="start all ranks together with torchrun, or unset RANK to look at this process alone",
        )
        return alone, Ranks(alone, environment, timeout), Finding.failed("torchrun", refused)


def _self_test(options: Namespace, entries: list[dict[str, Any]], here: Place) -> list[dict[str, str]]:
    """Under a launcher a rank tests the CPU and its own device; alone, every device there is."""
    import torch

    from distckpt.cli import selftest

    devices: list[torch.device] = []
    for entry in entries:
        kind, count = entry["type"], entry["count"]
        if not entry["on"] or (options.device and kind not in options.device):
            continue
        if kind == "cpu" or count is None:
            devices.append(torch.device(kind))
        elif here.size > 1:
            devices.append(torch.device(kind, here.local % count))
        else:
            devices += [torch.device(kind, i) for i in range(count)]
    if here.rank == 0:
        names = ", ".join(map(str, devices)) or "nothing"
        who = f" on each of {here.size} ranks" if here.size > 1 else ""
        print(f"distckpt doctor: replaying on {names}{who}", file=sys.stderr, flush=True)
    return [asdict(result) for result in selftest.run_selftests(devices)]


def _verdicts(everyone: list[Any], options: Namespace, left_out: str | None) -> list[Finding]:
    if left_out:
        fix = "leave out --no-self-test" if options.no_self_test else None
        return [Finding("off", "left out", left_out, fix)]
    if not any(everyone):
        return [_unknown(options)]
    found = [_equal(everyone)]
    for (device, detail, status), (cases, ranks) in _troubles(everyone).items():
        at = f"{_named(ranks)}: " if len(everyone) > 1 else ""
        what = f"{at}{'; '.join(cases)}: {detail}"
        if status == "unsure":
            found.append(Finding("warn", device, what))
        else:
            error = ReplayDiffers(what, fix="do not train with regions here; report it with --json")
            found.append(Finding.failed(device, error))
    missing = [rank for rank, results in enumerate(everyone) if results is None]
    if missing:
        error = RankMissing(
            f"{_named(missing)} said nothing within {options.timeout:g} s",
            why="dead, or hanging in the self-test",
            fix="look at its own output, or give --timeout more seconds",
        )
        found.append(Finding.failed("missing", error))
    return found


def _troubles(everyone: list[Any]) -> dict[tuple[str, str, str], tuple[list[str], list[int]]]:
    """What was not equal: (device, detail, status), with the cases and the ranks where it was so."""
    found: dict[tuple[str, str, str], tuple[list[str], list[int]]] = {}
    for rank, results in enumerate(everyone):
        for result in results or ():
            if result["status"] != "equal":
                cases, ranks = found.setdefault(
                    (result["device"], result["detail"], result["status"]), ([], [])
                )
                case = f"{result['case']}, {result['way']}" if result["way"] else result["case"]
                cases += [case] if case not in cases else []
                ranks += [rank] if rank not in ranks else []
    return found


def _named(ranks: list[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-3, 7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _equal(everyone: list[Any]) -> Finding:
    results = [result for found in everyone for result in found or ()]
    sure = [result for result in results if result["status"] != "unsure"]
    equal = sum(result["status"] == "equal" for result in sure)
    devices = ", ".join(dict.fromkeys(result["device"] for result in sure))
    ranks = f", {len(everyone)} ranks" if len(everyone) > 1 else ""
    good = equal == len(sure) > 0 and None not in everyone
    return Finding(
        "ok" if good else "off",
        "bitwise",
        f"{equal} of {len(sure)} replays equal on {devices or 'nothing'}{ranks}",
    )


def _unknown(options: Namespace) -> Finding:
    error = ReplayDiffers(
        f"nothing to test: no device of type {', '.join(options.device)} is on",
        fix="give --device one that is listed as ok above",
    )
    return Finding.failed("none", error)


def _print(sections: dict[str, Section], failures: int, warnings: int) -> None:
    head = "   ".join(
        f"{name} {version}" if name != "platform" else version for name, version in versions().items()
    )
    rows: list[tuple[str, str]] = [("", line) for line in wrap(head, "", "")]
    for section in sections.values():
        rows += [("", ""), *lines(section)]
    plural = [
        f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((failures, "failure"), (warnings, "warning"))
    ]
    rows += [("", ""), ("", ", ".join(plural))]
    after = "distckpt doctor --json    (each code has a section in docs/errors.md)"
    rows.append(("", f"Next: {after if failures else 'distckpt run train.py'}"))
    show(rows)


def _as_json(
    entries: list[dict[str, Any]],
    sections: dict[str, Section],
    everyone: list[Any],
    failures: int,
    warnings: int,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "ok": not failures,
        "failures": failures,
        "warnings": warnings,
        "versions": versions(),
        "devices": entries,
        "findings": {name: [asdict(f) for f in section.findings] for name, section in sections.items()},
        "ranks": [{"rank": rank, "results": results} for rank, results in enumerate(everyone)],
    }
