"""Every coded error of distckpt, public as ``dc.errors``. ``docs/errors.md`` has a section for each code.

Whoever catches errors by kind catches a base: a base has no code of its own, and stands above the errors of its kind.
"""

from __future__ import annotations

from distckpt_backends.errors import BackendLoadError as BackendLoadError
from distckpt_backends.errors import DeviceError as DeviceError
from distckpt_backends.errors import DistckptError as DistckptError
from distckpt_backends.errors import DuplicateBackendError as DuplicateBackendError
from distckpt_backends.errors import GraphCaptureError as GraphCaptureError
from distckpt_backends.errors import NoRngError as NoRngError
from distckpt_backends.errors import RngStateError as RngStateError
from distckpt_backends.errors import UnknownDeviceTypeError as UnknownDeviceTypeError
from distckpt_backends.errors import UnsupportedTorch as UnsupportedTorch
from torch.utils.checkpoint import CheckpointError as _TorchError  # before `compat.install` takes its name


class CheckpointError(_TorchError):
    """A replay did not match its forward. The base of every mismatch error, and torch's name for it.

    A subclass of torch's, so that an ``except`` clause that holds the original still catches it.
    """


class ReplayError(DistckptError, CheckpointError):
    """Base of the coded replay errors of ``dc.*``."""


class CountMismatch(ReplayError, code="DC101"):
    """The replay saved another number of tensors than the forward."""


class MetadataMismatch(ReplayError, code="DC102"):
    """A recomputed tensor has another shape, dtype or device than in the forward."""


class ValueMismatch(ReplayError, code="DC103"):
    """A recomputed tensor has other values than in the forward (``fingerprint`` or ``bitwise`` check)."""


class DrawMismatch(ReplayError, code="DC104"):
    """The replay drew another number of random numbers than the forward."""


class InputChanged(ReplayError, code="DC111"):
    """An input of the region was changed in place between forward and replay."""


class ParameterChanged(ReplayError, code="DC112"):
    """A parameter was changed in place between forward and replay."""


class PinMismatch(ReplayError, code="DC114"):
    """The replay pinned other values than the forward, or a pinned value was changed in place."""


class SelectiveMismatch(ReplayError, code="DC120"):
    """A selective replay ran an operator that its forward did not run."""


class SavedOutputChanged(ReplayError, code="DC121"):
    """An output kept by a selective region was changed in place."""


class ParameterRead(ReplayError, code="DC124"):
    """A replay computed a value from a parameter that was changed between forward and replay."""


class ScriptMismatch(ReplayError, code="DC128"):
    """TorchScript ran another graph in the replay than in the forward."""


class BatchedReplay(ReplayError, code="DC129"):
    """A replay under ``vmap`` failed: its forward ran under another one, or it draws random numbers."""


class RegionError(DistckptError):
    """Base: a forward did what no replay could do again exactly."""


class UnstashedDraw(RegionError, code="DC105"):
    """The forward drew random numbers on a device whose generator the region does not stash."""


class LateDevice(RegionError, code="DC106"):
    """A device was initialised for the first time inside a region."""


class MixedDeviceTypes(RegionError, code="DC107"):
    """A region's inputs live on two device types besides the CPU."""


class BufferChanged(RegionError, code="DC110"):
    """The forward changed a large buffer that the region had not kept a copy of."""


class SuppressedException(RegionError, code="DC113"):
    """The forward context of ``context_fn`` swallowed an exception of the region."""


class ScannedRegion(RegionError, ValueError, code="DC470"):
    """A region in a layer that torch_xla's scan traces asks for what only a replay could do."""


class ScannedDropout(RegionError, ValueError, code="DC471"):
    """A region in a layer that torch_xla's scan traces uses the fused dropout operator."""


class UnitInsideRegion(RegionError, code="DC472"):
    """A region runs a module that gathers and frees its own parameters, which its replay would upset."""


class LoopDraws(RegionError, code="DC473"):
    """A region runs torch_xla's scan, and random numbers were drawn that its replay would draw differently."""


class UsageError(DistckptError):
    """Base: a call that distckpt cannot carry out as it is written."""


class OptionCollision(UsageError, code="DC108"):
    """An option of ``dc.checkpoint`` is also a parameter of the wrapped function."""


class BadOption(UsageError, ValueError, code="DC109"):
    """An option has a value that the engine does not know or cannot honour."""


class SessionError(UsageError, code="DC115"):
    """A session was used after its release, or released twice."""


class StreamError(UsageError, ValueError, code="DC116"):
    """A random stream was registered twice, or is not one."""


class OffloadRefused(BadOption, code="DC122"):
    """A policy asked for CPU offload, which this version cannot do."""


class NoPolicy(BadOption, code="DC123"):
    """A policy answered something that is neither a ``CheckpointPolicy`` nor a bool."""


class NotAFunction(UsageError, TypeError, code="DC136"):
    """What was to run as a region cannot be called: None, a tensor, a list of layers."""


class NeedsArguments(UsageError, TypeError, code="DC137"):
    """A function was given alone, which runs it, and it needs arguments."""


class LazyFunction(UsageError, TypeError, code="DC138"):
    """A generator function or a coroutine function, which would run after its region has ended."""


class ModelError(DistckptError):
    """Base: modules that cannot become regions as asked: ``dc.apply``, FSDP units, other libraries' models."""


class NoMatch(ModelError, LookupError, code="DC301"):
    """A glob names no module of the model."""


class AlreadyRegion(ModelError, ValueError, code="DC302"):
    """A module that is to become a region is one already."""


class NeverCalled(ModelError, ValueError, code="DC303"):
    """A glob names only modules without a forward, which would never open their region."""


class ModuleGone(ModelError, ReferenceError, code="DC304"):
    """A region was called after the module it belongs to was deleted."""


class NotAModel(ModelError, TypeError, code="DC305"):
    """``dc.apply`` was given something else than a model first."""


class BadChoice(ModelError, TypeError, code="DC306"):
    """``dc.apply`` was told which modules in a form that it does not know."""


class UnknownModel(ModelError, LookupError, code="DC601"):
    """``dc.apply`` was given no glob, and no library knows the layers of this model."""


class OldFormat(ModelError, TypeError, code="DC602"):
    """A transformers model switches checkpointing the old way, which takes no function."""


class BothSwitches(ModelError, ValueError, code="DC603"):
    """distckpt and another activation checkpointing were both asked for on the same layers."""


class Rebound(ModelError, TypeError, code="DC604"):
    """The function inside a region's bound method was bound to something else."""


class RanksError(DistckptError):
    """Base: what happens between ranks, or differs from rank to rank."""


class WorldMismatch(RanksError, code="DC401"):
    """The launcher and the running process group (or XLA runtime) name another rank or world size."""


class WorldChanged(RanksError, ValueError, code="DC402"):
    """The world has another size than a plan, a state or the coordinator was fixed to."""


class NoStore(RanksError, code="DC403"):
    """There is more than one rank and no store to meet through, or the store does not answer."""


class RanksMissing(RanksError, TimeoutError, code="DC404"):
    """Ranks that did not come to a meeting within the timeout: dead, late, or somewhere else in the program."""


class RanksDisagree(RanksError, code="DC405"):
    """Ranks differ in versions, backends, random streams, world size or options."""


class MixedRankDevices(RanksError, code="DC406"):
    """Ranks train on different device types under the rule ``"error"``."""


class PlansDiffer(RanksError, code="DC407"):
    """Ranks of one stage have other regions, or were given another plan."""


class StageMissing(RanksError, LookupError, code="DC408"):
    """A pipeline stage that the plan has nothing about, or that no rank has."""


class PlanNotMet(RanksError, ValueError, code="DC409"):
    """The regions on the model are not those of the plan."""


class BadPlan(RanksError, ValueError, code="DC410"):
    """A text that is no region plan, or of another format version."""


class RemoteReplayFailed(RanksError, code="DC411"):
    """A replay failed on another rank."""


class CollectivesDiffer(RanksError, code="DC412"):
    """Ranks are about to enter, or have entered, different collectives inside replays."""


class RankFailed(RanksError, code="DC413"):
    """A rank met an error that is none of distckpt's while all ranks wait for it."""


class ModelsDiffer(RanksError, code="DC414"):
    """Ranks of one stage have models that differ in their modules or parameters."""


class ShardingError(RanksError):
    """Base: ``coord.fully_shard`` cannot make the units asked for, or a replay would upset them."""


class UnknownUnit(ShardingError, NoMatch, code="DC420"):
    """A unit glob names no module that FSDP2 can make a unit."""


class UnknownOption(ShardingError, TypeError, code="DC421"):
    """A keyword that neither this torch's ``fully_shard`` nor ``dc.apply`` takes."""


class AlreadySharded(ShardingError, ValueError, code="DC422"):
    """A module that is to become a unit, or one around it, is distributed already."""


class SharedAcrossUnits(ShardingError, ValueError, code="DC423"):
    """One parameter would belong to two units."""


class UnitsInsideRegion(ShardingError, NotImplementedError, code="DC424"):
    """A region has units inside it, which this torch would gather twice."""


class CannotShard(ShardingError, ValueError, code="DC425"):
    """FSDP2 does not take a unit with these options."""


class GatherOutsideBackward(ShardingError, code="DC426"):
    """A replay outside a backward called a unit, which would have to gather."""


class PipelineError(RanksError):
    """Base: ``coord.attach`` was given something else than the pipeline that runs."""


class UnknownSchedule(PipelineError, TypeError, code="DC430"):
    """What is to be attached is no schedule we know, and no pipeline stages either."""


class AlreadyAttached(PipelineError, ValueError, code="DC431"):
    """A stage is attached already."""


class StageNotInPlan(PipelineError, LookupError, code="DC432"):
    """The plan leaves out a stage of the pipeline, or names one that it does not have."""


class BadAhead(PipelineError, ValueError, code="DC433"):
    """``ahead`` is no amount of memory and not one micro-batch, or early replay is off."""


class RankStreamError(RanksError):
    """Base: random streams over ranks: their names, seeds and saved states."""


class UnknownStream(RankStreamError, LookupError, code="DC450"):
    """A named random stream was entered that nobody seeded."""


class StreamInUse(RankStreamError, code="DC451"):
    """Streams were entered, left, seeded or loaded in an order in which they would get mixed up."""


class BadStreams(RankStreamError, ValueError, code="DC452"):
    """Streams cannot be seeded as asked: mesh, seed or table is wrong."""


class StreamsDisagree(RankStreamError, code="DC453"):
    """Streams are not equal, or not different, over the ranks as their names promise."""


class UnsavableStream(RankStreamError, code="DC454"):
    """The state of a registered source is no plain data."""


class WrongState(RankStreamError, ValueError, code="DC455"):
    """Saved random states do not fit this rank, or this job; nothing was loaded."""


class PartitionError(RanksError):
    """Base: inputs that are divided over ranks."""


class BadPartition(PartitionError, ValueError, code="DC460"):
    """A partition cannot be made as asked, or met inputs that it cannot divide."""


class InputsDiffer(PartitionError, code="DC461"):
    """Inputs that should be the same on every rank of a partition are not."""


class GatherMismatch(PartitionError, ReplayError, code="DC462"):
    """The ranks of a partition gathered inputs of different regions."""


class CliError(DistckptError):
    """Base of what a user of the ``distckpt`` command can get wrong: one line each, and exit code 2."""

    def line(self) -> str:
        """The whole error on one line, for a terminal."""
        return f"[{self.code}] {self.what}: {self.fix}"


class BadUsage(CliError, code="DC701"):
    """A command, a flag or a value that the command line does not have."""


class NoScript(CliError, code="DC702"):
    """The script or module that is to run does not exist, or cannot be read."""


class BadEnvironment(CliError, code="DC703"):
    """The variables that a launcher sets are incomplete or contradict each other."""


class ReplayDiffers(CliError, code="DC704"):
    """A replay of the self-test was not equal to its forward, bit by bit, or raised."""


class Conflict(CliError, code="DC705"):
    """Another library, or one of its switches, takes the place of our regions or makes them wrong."""


class RankMissing(CliError, code="DC706"):
    """A rank did not say in time what it found."""


class TorchAnswers(DistckptError, code="DC209"):
    """Torch's own engine still answers after an installation, which was taken back."""


def by_code(code: str) -> type[DistckptError]:
    """The error class that a code stands for; the base class when this process has not loaded it."""
    classes = [DistckptError]
    for kind in classes:
        if kind.__dict__.get("code") == code:
            return kind
        classes.extend(kind.__subclasses__())
    return DistckptError
