"""Consistency: what a rank says about itself before the first step, and the one verdict on what all have said.

A statement is short whatever the model's size: facts and hashes. What stands behind the hashes is sent by a few
ranks, and only on disagreement.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from distckpt_backends import get as backend_for
from distckpt_backends.errors import DistckptError

import distckpt
from distckpt.engine import streams
from distckpt.engine.rng import DefaultDeviceType, device_types
from distckpt.errors import (
    BadOption,
    MixedRankDevices,
    ModelsDiffer,
    PlansDiffer,
    RanksDisagree,
    StageMissing,
)
from distckpt.ranks.plan import (
    MeshPlace,
    RegionPlan,
    Signature,
    canonical,
    comparable,
    describe_region,
    differing_facts,
    differing_regions,
    digest,
    dimensions,
    listed,
    meet_plan,
)
from distckpt.ranks.store import Verdict, failed, named_ranks, spans
from distckpt.ranks.world import World

# Mesh dimensions along which the plans are free to differ: each coordinate is a pipeline stage.
STAGE_DIMENSIONS = ("pp", "pipe", "pipeline", "stage")


SHOWN = (
    4  # different answers to one question that a diff shows; their first ranks are asked for the long text
)

# Equal on every rank, in the order in which a difference is reported. The device type has a rule of its own.
_EQUAL = ("world size", "distckpt", "torch", "rule", "device backend", "collectives")

Groups = dict[str, list[int]]  # answer -> the ranks that gave it

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Statement:
    """The message (:meth:`short`), and what stands behind its hashes (:meth:`long`), sent on disagreement only.

    ``failure`` is what is wrong on this rank already, so that the others raise it too instead of waiting; ``cause`` is
    the exception behind it, which stays here.
    """

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    streams: tuple[str, ...] = ()
    plan: RegionPlan = dataclasses.field(default_factory=lambda: RegionPlan({}))
    given: str | None = None
    models: Mapping[str, Signature] = dataclasses.field(default_factory=dict)
    place: MeshPlace | None = None
    failure: dict[str, Any] | None = None
    cause: Exception | None = None

    def short(self) -> bytes:
        """A few hundred bytes: facts, hashes, and three hashes per stage that this rank has."""
        if self.failure is not None:
            return canonical({"failure": self.failure}).encode()
        said = {
            **self.facts,
            "streams": digest(canonical(self.streams)),
            "given": None if self.given is None else digest(self.given),
            "plan": {stage: digest(canonical(regions)) for stage, regions in self.plan.stages.items()},
            "models": {stage: signature.hashes() for stage, signature in self.models.items()},
            "place": None if self.place is None else [self.place.structure, self.place.shapes],
        }
        return canonical(said).encode()

    def long(self) -> bytes:
        """Names of the streams, the given plan, and the regions and the signature of every stage of this rank."""
        given = None if self.given is None else json.loads(self.given)["stages"]
        models = {stage: [s.structure, s.shapes] for stage, s in self.models.items()}
        said = {"streams": self.streams, "given": given, "plan": self.plan.stages, "models": models}
        return canonical(said).encode()


@dataclasses.dataclass(frozen=True)
class Work(Generic[T]):
    """What came of some work on this rank: facts that are to be equal over ranks, or what went wrong."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failure: dict[str, Any] | None = None
    cause: Exception | None = None
    result: T | None = None

    @classmethod
    def of(cls, work: Callable[[], T], facts: Callable[[T], Mapping[str, Any]]) -> Work[T]:
        """Do the work. Nothing is raised: the other ranks wait for what this one says."""
        try:
            done = work()
            return cls(
                {name: canonical(comparable(value)) for name, value in facts(done).items()}, result=done
            )
        except Exception as error:
            return cls(failure=Verdict.of(failed(error)).error, cause=error)

    @property
    def done(self) -> T:
        """What the work returned, where it did not fail."""
        return cast("T", self.result)

    def short(self) -> bytes:
        """The message. A plan is as long as somebody wrote it down, so it goes as it is."""
        said = {"failure": self.failure} if self.failure is not None else {"facts": self.facts}
        return canonical(said).encode()


def collect(
    model: torch.nn.Module | Mapping[Any, torch.nn.Module] | None,
    *,
    device_type: str | None,
    rule: str,
    world: World,
    world_size: int | None,
    plan: RegionPlan | str | Path | None,
    mesh: Any = None,
    stage: Any = None,
) -> Statement:
    """Look at this rank. Whatever is wrong here already becomes the statement's ``failure``; nothing is raised.

    ``world_size`` is the size that the world is fixed to, or None.
    """
    try:
        world.require_size(world_size, "the coordinator")
        modules = _modules(model)
        own = RegionPlan({}) if model is None else own_plan(model, mesh, stage)
        device = device_type_of(modules, device_type, rule)
        if plan is not None:
            plan = plan if isinstance(plan, RegionPlan) else RegionPlan.from_json(plan)
            world.require_size(plan.world_size, "the plan")
            meet_plan(own, plan)
        facts = {
            "rule": rule,
            "world size": world.size,
            "device type": device,
            "device backend": "+".join(type(backend_for(kind)).__name__ for kind in device.split("+")),
            "collectives": collectives(),
            "torch": torch.__version__,
            "distckpt": distckpt.__version__,
        }
        names = tuple(sorted(stream.name for stream in streams.registered()))
        models = {stage: Signature.of(part) for stage, part in zip(own.stages, modules, strict=True)}
        place = None if mesh is None else MeshPlace.in_mesh(mesh)
        given = None if plan is None else plan.to_json()
        made = Statement(facts, names, own, given, models, place)
        made.short()
        return made
    except Exception as error:  # the other ranks wait for what this one says, whatever happened to it
        return Statement(failure=Verdict.of(failed(error)).error, cause=error)


def _modules(model: Any) -> list[torch.nn.Module]:
    if model is None:
        return []
    parts = list(model.values()) if isinstance(model, Mapping) else [model]
    for part in parts:
        if not isinstance(part, torch.nn.Module):
            shown = repr(part) if isinstance(part, (str, int)) else f"a {type(part).__name__}"
            raise BadOption(
                f"check looks at a module or at a mapping of stages to modules, not at {shown}",
                fix="coord.check(model), or coord.check({0: first, 4: second}) for several stages on one rank",
            )
    return parts


def own_plan(model: Any, mesh: Any, stage: Any) -> RegionPlan:
    """This rank's part of the plan: its stage is named by ``stage``, the mapping's keys, or the mesh."""
    if not isinstance(model, torch.nn.Module):
        if stage is not None or (mesh is not None and _stage_dimensions(mesh)):
            raise BadOption(
                "the stages are named by the mapping's keys and by stage= or mesh= as well",
                fix="leave stage= out, and a mesh with a pipeline dimension too",
            )
        for name in model:
            _check_stage(name)
        return RegionPlan.of(model)
    if stage is None and mesh is not None:
        stage = _stage_in(mesh)
    _check_stage(0 if stage is None else stage)
    return RegionPlan.of(model, stage=0 if stage is None else stage)


def _check_stage(stage: Any) -> None:
    # Stages are compared by what they are called; an object is called by its address, another one on each rank.
    if not isinstance(stage, str) and not hasattr(stage, "__index__"):
        raise BadOption(
            f"a stage is a number or a name, not a {type(stage).__name__}",
            fix="stage=stage.stage_index, or a mapping of stage indices to modules",
        )


def _stage_in(mesh: Any) -> str | None:
    names, at = dimensions(mesh), mesh.get_coordinate()
    if at is None:
        raise BadOption("this rank is not in the mesh", fix="check with a mesh that every rank is in")
    return "-".join(str(i) for name, i in zip(names, at, strict=True) if name in STAGE_DIMENSIONS) or None


def _stage_dimensions(mesh: Any) -> list[str]:
    return [name for name in dimensions(mesh) if name in STAGE_DIMENSIONS]


def device_type_of(modules: Iterable[torch.nn.Module], expected: str | None, rule: str) -> str:
    """The device type that this rank trains on: ``expected``, else that of the modules' tensors, else the machine's.

    CPU and meta tensors never count. Under ``"warn"`` and ``"all"`` several types are joined by ``+``.

    Raises:
        MixedRankDevices: the modules are on another type than expected, or on several, under the rule ``"error"``.
    """
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    types = device_types(tensors)
    if expected is not None and expected not in types:
        types.insert(0, expected)
    if expected == "cpu" and len(types) == 1:
        return expected
    if len(types) > 1 and rule == "error":
        met = sorted({tensor.device.type for tensor in tensors} - {"cpu", "meta"})
        asked = f", and the coordinator is for {expected}" if expected else ""
        raise MixedRankDevices(
            f"the model of a rank is on {' and '.join(met)}{asked}",
            why="a region stashes the random state of the CPU and one other device type",
            fix='move the model to one type, or choose Coordinator(rule="all")',
        )
    return "+".join(types) if types else DefaultDeviceType.get_device_type()


def collectives() -> str:
    """The collective backends of the default group, as torch spells them; ``"none"`` without one."""
    if not dist.is_available() or not dist.is_initialized():
        return "none"
    return str(dist.get_backend_config())


def judge(messages: dict[int, bytes], texts: dict[int, bytes] | None) -> Verdict:
    """Compare the ranks' statements. While ``texts`` is None it may ask for some, when only hashes differ.

    The first difference decides which error it is; every difference is in its diff by rank.
    """
    said = {rank: json.loads(message) for rank, message in messages.items()}
    failures = {rank: s["failure"] for rank, s in said.items() if "failure" in s}
    if failures:
        return _failed(failures, len(said))
    devices = _grouped({rank: s["device type"] for rank, s in said.items()})
    rule = next(iter(said.values()))["rule"]
    found: list[tuple[type[DistckptError], str, list[str]]] = []
    for question in _EQUAL:
        if question == "device backend" and len(devices) > 1:
            continue  # follows from the device type
        groups = _grouped({rank: s[question] for rank, s in said.items()})
        if len(groups) > 1:
            found.append((RanksDisagree, question, _by_rank(question, groups)))
    mixed = _mixed(devices, rule)
    if mixed and rule == "error":
        found.append((MixedRankDevices, "device type", _by_rank("device type", devices)))
    missing = _missing_stage(said)
    if missing:
        return Verdict.of(missing)
    asked, compare = _hashes(said)
    if asked and texts is None:
        return Verdict(ask=tuple(asked))
    found.extend(compare({rank: json.loads(text) for rank, text in (texts or {}).items()}))
    if found:
        return Verdict.of(_error(found, len(said), all(s["place"] for s in said.values())))
    warned = f"ranks train on several device types: {'; '.join(_by_rank('device type', devices))}"
    return Verdict(warnings=(warned,) if mixed and rule == "warn" else ())


def judge_work(messages: dict[int, bytes], texts: dict[int, bytes] | None) -> Verdict:
    """Compare what came of the same work on every rank. A fact is equal over the ranks that have it."""
    said = {rank: json.loads(message) for rank, message in messages.items()}
    failures = {rank: s["failure"] for rank, s in said.items() if "failure" in s}
    if failures:
        return _failed(failures, len(said))
    names = dict.fromkeys(name for s in said.values() for name in s["facts"])
    answers = {n: _grouped({r: s["facts"][n] for r, s in said.items() if n in s["facts"]}) for n in names}
    differ = {name: groups for name, groups in answers.items() if len(groups) > 1}
    if not differ:
        return Verdict()
    lines = [line for name, groups in differ.items() for line in _by_rank(name, groups)]
    return Verdict.of(_error([(PlansDiffer, ", ".join(differ), lines)], len(said), meshed=True))


def _grouped(answers: Mapping[int, Any]) -> Groups:
    groups: Groups = defaultdict(list)
    for rank, answer in answers.items():
        groups[answer if isinstance(answer, str) else canonical(answer)].append(rank)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[1])))


def _mixed(devices: Groups, rule: str) -> bool:
    return rule != "all" and (len(devices) > 1 or "+" in next(iter(devices)))


def _by_rank(question: str, groups: Groups) -> list[str]:
    return [f"{question}: {answer} on {named_ranks(members)}" for answer, members in groups.items()]


def _failed(failures: dict[int, dict[str, Any]], size: int) -> Verdict:
    """What is wrong on a rank by itself, on every rank."""
    groups = _grouped(failures)
    first, members = next(iter(groups.items()))
    error = json.loads(first)
    error["where"] = "\n         ".join(filter(None, [f"{named_ranks(members)} of {size}", error["where"]]))
    others = [f"{json.loads(e)['what']}, on {named_ranks(m)}" for e, m in list(groups.items())[1:SHOWN]]
    error["why"] = "\n         ".join(filter(None, [error["why"], *others])) or None
    return Verdict(error)


def _missing_stage(said: Mapping[int, Any]) -> StageMissing | None:
    stages = {stage for s in said.values() for stage in s["plan"]}
    if not all(stage.isdigit() for stage in stages):
        return None
    absent = sorted(set(range(max(map(int, stages), default=-1) + 1)) - set(map(int, stages)))
    if not absent:
        return None
    by_rank = _by_rank("stages", _grouped({rank: sorted(s["plan"]) for rank, s in said.items()}))
    return StageMissing(
        f"no rank has stage {spans(absent)}",
        where=listed(by_rank),
        why="the regions of a stage that nobody checks may differ between its ranks",
        fix="pass every stage of this rank, check({0: first, 4: second}), or the mesh with its pipeline dimension",
    )


def _hashes(
    said: Mapping[int, Any],
) -> tuple[list[int], Callable[[Mapping[int, Any]], list[tuple[type[DistckptError], str, list[str]]]]]:
    """Which ranks' long texts are needed to show where hashes differ, and what shows it once they are there."""
    questions: list[tuple[type[DistckptError], str, str, Groups]] = []
    for kind, name in ((RanksDisagree, "streams"), (PlansDiffer, "given")):
        questions.append((kind, name, "", _grouped({r: s[name] for r, s in said.items()})))
    stages: dict[str, dict[int, str]] = defaultdict(dict)
    for rank, s in said.items():
        for stage, value in s["plan"].items():
            stages[stage][rank] = value
    questions.extend((PlansDiffer, "plan", stage, _grouped(stages[stage])) for stage in sorted(stages))
    questions.extend(_models(said))
    open_questions = [q for q in questions if len(q[3]) > 1]
    asked = sorted({members[0] for *_, groups in open_questions for members in list(groups.values())[:SHOWN]})

    def compare(texts: Mapping[int, Any]) -> list[tuple[type[DistckptError], str, list[str]]]:
        found: list[tuple[type[DistckptError], str, list[str]]] = []
        for kind, name, stage, groups in open_questions:
            told = [(members, texts[members[0]][name]) for members in groups.values() if members[0] in texts]
            untold = sorted(
                rank for members in groups.values() if members[0] not in texts for rank in members
            )
            if name == "streams":
                subject, lines = "random streams", _streams(told)
            elif name == "plan":
                subject, lines = f"regions of stage {stage}", _regions(told, stage)
            elif name == "given":
                subject, lines = "plan that was passed", _given(told)
            else:
                subject, lines = f"model of stage {stage}", _signatures(told, stage)
            rest = (
                [f"{subject}: other ones on {named_ranks(untold)}, which did not tell them"] if untold else []
            )
            found.append((kind, subject, lines + rest))
        return found

    return asked, compare


def _models(said: Mapping[int, Any]) -> list[tuple[type[DistckptError], str, str, Groups]]:
    """Per stage: structures over its ranks, and local shapes over those at one place of the mesh, where they differ."""
    answers: dict[tuple[str, int, str], dict[int, str]] = defaultdict(dict)
    for rank, s in said.items():
        place = s["place"] or ("", "")
        for stage, hashes in s["models"].items():
            for part, value in enumerate(hashes):
                answers[stage, part, place[part]][rank] = value
    return [
        (ModelsDiffer, "models", stage, _grouped(answers[stage, part, at]))
        for stage, part, at in sorted(answers)
    ]


def _streams(answers: list[tuple[list[int], Any]]) -> list[str]:
    return [
        f"random streams: {', '.join(names) or 'none'} on {named_ranks(members)}"
        for members, names in answers
    ]


def _regions(answers: list[tuple[list[int], Any]], stage: str) -> list[str]:
    """Module by module, what each group of ranks does that differs from what most do."""
    parts = [(members, plan.get(stage, {})) for members, plan in answers]
    by_answer: dict[str, list[str]] = defaultdict(list)
    for name in sorted(
        {name for _, regions in parts[1:] for name in differing_regions(parts[0][1], regions)}
    ):
        by_entry: dict[str, list[int]] = defaultdict(list)
        for members, regions in parts:
            by_entry[describe_region(regions.get(name))].extend(members)
        by_answer["; ".join(f"{entry} on {named_ranks(r)}" for entry, r in by_entry.items())].append(name)
    return [f"stage {stage}, {_names(names)}: {said}" for said, names in by_answer.items()]


def _signatures(answers: list[tuple[list[int], Any]], stage: str) -> list[str]:
    """Parameter by parameter in the model's order, what each group of ranks has."""
    parts = [
        (members, dict(map(tuple, [*structure, *shapes])))
        for members, models in answers
        for structure, shapes in [models[stage]]
    ]
    lines: dict[str, None] = {}
    for _, facts in parts[1:]:
        for fact in differing_facts(parts[0][1], facts):
            by_value: dict[str, list[int]] = defaultdict(list)
            for members, theirs in parts:
                by_value[_shown(theirs[fact]) if fact in theirs else "not there"].extend(members)
            said = "; ".join(f"{value} on {named_ranks(r)}" for value, r in by_value.items())
            lines[f"stage {stage}, {fact}: {said}"] = None
    return list(lines)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _names(names: list[str], most: int = 6) -> str:
    shown = [name or "the model" for name in names[:most]]
    return ", ".join([*shown, f"{len(names) - most} more"] if len(names) > most else shown)


def _given(answers: list[tuple[list[int], Any]]) -> list[str]:
    lines = []
    for members, stages in answers:
        counts = None if stages is None else {stage: len(regions) for stage, regions in stages.items()}
        shown = "none" if counts is None else f"regions by stage {canonical(counts)}"
        lines.append(f"plan that was passed: {shown} on {named_ranks(members)}")
    return lines


def _error(found: list[tuple[type[DistckptError], str, list[str]]], size: int, meshed: bool) -> DistckptError:
    kind, _, _ = found[0]
    lines = [line for _, _, part in found for line in part]
    whys = {
        RanksDisagree: "ranks that differ here run different programs, and their collectives need not match",
        MixedRankDevices: "a region stashes the random state of the CPU and one other device type, equal on all ranks",
        PlansDiffer: "a replay may contain collectives; ranks of one stage that replay differently wait for each other",
        ModelsDiffer: "ranks of one stage train one model; where they differ, collectives hang or mix what does not "
        "belong together",
    }
    fixes = {
        RanksDisagree: "give every rank the same environment, and register the same streams everywhere",
        MixedRankDevices: 'train on one device type, or choose Coordinator(rule="warn") or rule="all"',
        PlansDiffer: "apply the same regions on every rank of a stage; stages that may differ need stage= or mesh=",
        ModelsDiffer: "build, freeze and set the same model on every rank of a stage"
        + (
            ""
            if meshed
            else "; pass mesh= to say which ranks are other stages, or have other parts of plain tensors: without it "
            "all ranks of a stage are compared as one group"
        ),
    }
    subjects = ", ".join(dict.fromkeys(subject for _, subject, _ in found))
    return kind(f"{size} ranks differ in: {subjects}", where=listed(lines), why=whys[kind], fix=fixes[kind])
