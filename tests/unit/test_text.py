from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from gradwire.job.files import text_files
from gradwire.job.text import Windows, load_text, validation_batches
from gradwire_protocol.errors import DataError


def test_the_standard_library_is_the_default_and_leaves_tests_out() -> None:
    files = text_files(None)
    assert len(files) > 300
    assert any(file.name == "argparse.py" for file in files)
    assert not any({"test", "tests", "site-packages"} & {*file.parts[-3:]} for file in files)
    assert files == sorted(files)


def test_held_out_files_are_not_trained_on(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index:02}.txt").write_bytes(bytes([index]) * 100 if index else b"\x01" * 100)
    text = load_text(tmp_path, 50)
    assert {*text.validation.tolist()} == {10, 30}
    assert not {*text.training.tolist()} & {10, 30}
    assert len(text.training) + len(text.validation) == 4000


def test_a_single_file_holds_its_end_out(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"a" * 950 + b"b" * 50)
    text = load_text(file, 20)
    assert {*text.training.tolist()} == {ord("a")}
    assert text.validation.tolist() == [ord("b")] * 50


def test_binary_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "notes.txt").write_bytes(b"x" * 1000)
    text = load_text(tmp_path, 20)
    assert len(text.training) + len(text.validation) == 1000


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="The data folder is empty"):
        load_text(tmp_path, 20)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        text_files(tmp_path / "nowhere")


def test_too_little_text_is_refused_with_the_amounts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError) as caught:
        load_text(tmp_path, 129)
    assert "129 bytes" in caught.value.expected
    assert "1 text files" in caught.value.got


def test_an_epoch_takes_every_window_once() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    windows = Windows(text, context=10, batch=7, seed=1)
    batches = list(windows.epoch(0))
    assert len(batches) == len(windows)
    starts = [start for x, _ in batches for start in x[:, 0].tolist()]
    assert len(starts) == len({*starts}) == windows.windows
    assert {start % 10 for start in starts} == {starts[0] % 10}
    for x, y in batches:
        assert x.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(y[:, -1], x[:, -1] + 1)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    text = torch.randint(256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def epochs(seed: int) -> list[list[int]]:
        windows = Windows(text, context=16, batch=4, seed=seed)
        return [torch.cat([x for x, _ in windows.epoch(number)]).flatten().tolist() for number in range(2)]

    torch.manual_seed(7)
    first = epochs(1)
    torch.manual_seed(8)
    assert epochs(1) == first
    assert first[0] != first[1]
    assert epochs(2)[0] != first[0]


def test_batches_go_on_from_any_step() -> None:
    text = torch.randint(256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    windows = Windows(text, context=16, batch=8, seed=3)
    steps = 3 * len(windows) + 2
    all_of_them = list(itertools.islice(windows.from_step(0), steps))
    assert torch.equal(all_of_them[len(windows)][0], next(windows.epoch(1))[0])
    for step in (1, len(windows) - 1, len(windows), 2 * len(windows) + 1):
        rest = itertools.islice(windows.from_step(step), steps - step)
        for (x, y), (expected_x, expected_y) in zip(rest, all_of_them[step:], strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)


def test_a_position_tells_other_data_apart() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    position = Windows(text, context=10, batch=7, seed=1).position(5)
    assert position == Windows(text.clone(), context=10, batch=7, seed=1).position(5)
    assert position != Windows(text.flip(0), context=10, batch=7, seed=1).position(5)
    assert position != Windows(text, context=10, batch=7, seed=2).position(5)


def test_the_smallest_text_gives_one_window() -> None:
    text = torch.arange(11, dtype=torch.uint8)
    ((x, y),) = Windows(text, context=10, batch=4, seed=0).epoch(0)
    assert x.tolist() == [list(range(10))]
    assert y.tolist() == [list(range(1, 11))]


def test_validation_windows_are_spread_and_stay_the_same() -> None:
    text = torch.arange(251, dtype=torch.uint8)
    batches = validation_batches(text, context=10, batch=3, windows=5)
    assert [len(x) for x, _ in batches] == [3, 2]
    assert torch.cat([x[:, 0] for x, _ in batches]).tolist() == [0, 50, 100, 150, 200]
    assert sum(len(x) for x, _ in validation_batches(text, context=10, batch=3, windows=1000)) == 25
