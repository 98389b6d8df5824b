"""The data stream: real text, a position that can be saved, other text on every rank."""

from __future__ import annotations

from pathlib import Path

import torch

from launch.data import Batches, read


def stream(rank: int = 0, seed: int = 0) -> Batches:
    return Batches(torch.arange(200, dtype=torch.uint8), batch=3, context=8, seed=seed, rank=rank)


def test_the_default_text_is_the_standard_library() -> None:
    text = bytes(read(None, 128)[:100_000].tolist())
    assert b"import" in text


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first ")
    assert bytes(read(tmp_path, 4).tolist()) == b"first second"


def test_a_target_is_the_next_byte() -> None:
    inputs, targets = stream().next()
    assert inputs.shape == targets.shape == (3, 8)
    assert torch.equal(targets, inputs + 1)


def test_a_stream_goes_on_from_a_saved_position() -> None:
    one, other = stream(), stream(seed=5)
    one.next()
    other.seek(one.position())
    assert torch.equal(one.next()[0], other.next()[0])


def test_ranks_read_other_text_and_leave_the_default_generator_alone() -> None:
    before = torch.get_rng_state()
    assert not torch.equal(stream(rank=0).next()[0], stream(rank=1).next()[0])
    assert torch.equal(before, torch.get_rng_state())
