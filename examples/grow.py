"""A model of bytes grows twice while it trains, with its optimiser, and the loss does not notice.

Four heads become six and then eight, and 32 hidden units 64 and 128. Each growth prints what the new rows are: which
are zero, so that nothing changes, and which receive a gradient, so that they learn. For language models
``cem train --grow`` does the same. Expected last line:

    the loss changed by less than 1e-4 at each growth: True
"""

from pathlib import Path

import torch
from torch.nn import functional as F

import cem

TEXT = torch.tensor(list(Path(__file__).read_bytes()))
STAGES = ({"heads": 4, "hidden": 32}, {"heads": 6, "hidden": 64}, {"heads": 8, "hidden": 128})


def loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, steps=24):
    schedule = cem.warm_restart(optimizer, steps, warmup=4)
    for _ in range(steps):
        starts = torch.randint(len(TEXT) - 64, (8, 1))
        optimizer.zero_grad()
        loss(model, TEXT[starts + torch.arange(64)]).backward()
        optimizer.step()
        schedule.step()


def main():
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm
    model = torch.nn.Sequential(
        torch.nn.Embedding(256, 32),
        cem.derive(cem.energies.rotary_interaction, dim=32, heads=4, rank=8, norm=norm),
        cem.derive(cem.energies.gated, dim=32, hidden=32, norm=norm),
        torch.nn.Linear(32, 256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    jumps = []
    for stage, sizes in enumerate(STAGES):
        if stage:
            before = loss(model, TEXT[None]).item()
            print(cem.grow(model, optimizer=optimizer, **sizes))
            jumps.append(loss(model, TEXT[None]).item() - before)
        train(model, optimizer)
        print(f"{sizes}: loss {loss(model, TEXT[None]).item():.2f} nats a byte")
    print("the loss changed by less than 1e-4 at each growth:", max(map(abs, jumps)) < 1e-4)


if __name__ == "__main__":
    main()
