"""Writes docs/models.md: the kinds of models that tests/integration/test_models.py tries, and what they gave.

Run it to write the file: python tests/integration/model_table.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import zoo_awkward
import zoo_huggingface
import zoo_refused
import zoo_torch
from model_zoo import Kind

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
_TEXT = """# Which models train

Any `torch.nn.Module` that `torch.export` takes, as it is. The tables below are what `tests/integration/test_models.py`
tries, and are written by `tests/integration/model_table.py`; a test compares the two.

## Supported

Each kind is trained in float64 on 2 stages with 1, 2 and 5 micro-batches (the last of unequal sizes), and on 3 stages
cut at random places, without dropout. Losses, every gradient, updated weights and changed buffers equal one process
within 10⁻¹⁰.

Compared with:

- *whole batch*: one process that takes the whole batch at once.
- *micro-batches*: one process that accumulates the gradients of the same micro-batches. Rows of a batch depend on one
  another (batch statistics, buffers that change), so that the whole batch is another calculation.
- *micro-batches, float32*: the same, because the model computes parts in float32 whatever its own type is (its loss,
  its normalisations, its scan). Float32's rounding then differs between a whole batch and its micro-batches, in one
  process as well. Gradients and weights are within 10⁻¹⁰ of the same micro-batches; the loss, and everything beside
  the whole batch, within 10⁻⁵.

{supported}

Random numbers (dropout and the like) are drawn from the seed, the step, the micro-batch and the operator: the same on
every layout and in recomputation, but not those that eager mode draws by itself. `gradwire verify` draws them in one
process, too, and so compares models with their own dropout ([verify.md](verify.md#random-numbers)); the kinds of draws
are tried in `tests/unit/test_draws.py`.

## Lengths that differ between batches

The rows of a batch may always differ. Name other dimensions that do; equal names mean equal sizes:

```python
cluster.trainer(..., example=batch, dynamic={{"input_ids": {{1: "length"}}, "labels": {{1: "length"}}}})
cluster.trainer(..., example=(x, y), dynamic=({{1: "length"}}, None))  # a tuple: one entry for each element
```

The export finds bounds and multiples (the longest position, sizes that pooling halves), and each batch is checked
against them: `BatchError` names the input, the dimension and both sizes. A name may also be given as
`torch.export.Dim("length", min=2, max=512)`. Costs are estimated at the example's sizes. Sizes that a loop in Python
runs over, and the time steps of `nn.LSTM`, `nn.GRU` and `nn.RNN`, are built into the graph: pad these.

## Models that make a number of their rows

Code such as `float(x.shape[0])`, `range(x.shape[0])` or `if x.shape[0] > 2` works for one number of rows once exported.
Such a model trains if all micro-batches have the same:

```python
cluster.trainer(..., plan=gradwire.Plan(microbatches=4), micro_batch_rows=8)
```

Each batch then has 8, 16, 24 or 32 rows, for `evaluate` and `predict`, too; `BatchError` names these sizes for any
other (`drop_last=True` of a `DataLoader` leaves a smaller last batch out). An output counts as one for each row if its
first dimension has that size. Tried in `tests/integration/test_fixed_rows.py`.

## Operators of your own

Operators of `torch.library.custom_op` train like torch's, with the gradient of their `register_autograd`. Code never
travels: put them into a module (`my_operators.py`) that the script imports, and start the stage servers with it.

```python
with gradwire.local(stage_servers=2, operators=["my_operators"]) as cluster:  # on one machine
    ...
```

```
gradwire up --operators ./my_operators.py
gradwire-stage-server --coordinator HOST:PORT --operators /opt/models/my_operators.py
```

A module is named by whoever starts the server, never by a message; it may be given by name, where it is installed, or
as DIRECTORY/MODULE, and the option may be repeated (`GRADWIRE_STAGE_OPERATORS`, separated by commas; `operators` in the
settings file). A server admits the operators that the import defined, outside of torch's own namespaces, and tells the
coordinator their schemas. A run takes servers that have all of its model's operators with the same schema as the
script's; otherwise `ModelError` names the operator, the servers, and both schemas.

Libraries have operators of their own, too: Hugging Face's mixtures of experts (Mixtral) train with
`operators=["transformers.integrations.moe"]`.

- Operators that write to their arguments, or return them, are refused: other micro-batches would see it.
- An operator that draws random numbers needs `tags=(torch.Tag.nondeterministic_seeded,)`: it is then seeded as torch's
  own are.
- Costs are estimated from the bytes that an operator reads and writes; where that is far off, give
  `gradwire.Plan(cuts=...)`.

## Refused

What would train wrongly, or cannot be exported, raises `ModelError` before anything is sent. It names the operator or
the break, the module, the user's line, and a way out.

{refused}
"""


def table() -> str:
    """The text of docs/models.md."""
    groups = (
        ("Hugging Face transformers", zoo_huggingface.KINDS),
        ("torch's layers", zoo_torch.KINDS),
        ("Awkward in one way", zoo_awkward.KINDS),
    )
    supported = "\n\n".join(f"### {title}\n\n{_supported(kinds)}" for title, kinds in groups)
    rows = [f"{kind.name} | {kind.message} | {kind.way_out}" for kind in zoo_refused.REFUSED]
    refused = "\n".join(["Kind | The error says | The way out", "--- | --- | ---", *rows])
    return _TEXT.format(supported=supported, refused=refused)


def _supported(kinds: Iterable[Kind]) -> str:
    rows = [f"{kind.name.removeprefix('Hugging Face ')} | {kind.shows} | {_reference(kind)}" for kind in kinds]
    return "\n".join(["Kind | What it shows | Compared with", "--- | --- | ---", *rows])


def _reference(kind: Kind) -> str:
    if kind.float32_weight is not None:
        return "micro-batches, float32"
    return "micro-batches" if kind.rows_depend else "whole batch"


if __name__ == "__main__":
    TABLE.write_text(table())
