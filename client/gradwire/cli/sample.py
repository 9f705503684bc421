"""`gradwire sample`: continues a prompt with the weights that a run left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradwire.collector import collector_paused
from gradwire.job.run_directory import RunDirectory


def sample(
    run: Annotated[Path, typer.Argument(help="Run directory, as `gradwire train` made it")],
    prompt: Annotated[str, typer.Option(help="Text to continue")] = "def ",
    length: Annotated[int, typer.Option(min=1, help="Bytes to add")] = 400,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest byte each time")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws")] = 0,
) -> None:
    """Continue a prompt with a run's weights."""
    directory = RunDirectory.find(run)
    settings = directory.read_settings()
    with collector_paused():
        from gradwire.job.gpt import GPT, Shape, continue_text  # imports torch: not for a wrong path

    shape = Shape(**{name: settings[name] for name in ("layers", "width", "heads", "context")})
    model = GPT(shape)
    model.load_state_dict(directory.read_weights())
    added = continue_text(model, prompt.encode(), length, temperature=temperature, seed=seed)
    # The model writes bytes: not all of them make characters.
    print(prompt + added.decode(errors="replace"))
