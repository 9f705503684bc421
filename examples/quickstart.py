"""The shortest training run: any module, any torch optimizer, two pipeline stages on this machine."""

import torch
import torch.nn.functional as F

import gradwire

model = torch.nn.Sequential(
    torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(512, 64)
y = x[:, :10].argmax(dim=1)

with gradwire.local(stage_servers=2, threads=1) as cluster:
    plan = gradwire.Plan(stages=2, microbatches=8)
    trainer = cluster.trainer(model, optimizer, loss=F.cross_entropy, example=(x, y), plan=plan)
    for result in trainer.run([(x, y)], steps=100):
        if result.step % 20 == 0:
            print(f"step {result.step}: loss {result.loss:.3f}, bubble {result.bubble:.0%}")
    model.load_state_dict(trainer.state_dict())
