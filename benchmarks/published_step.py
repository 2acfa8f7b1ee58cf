"""A search step as published code computes it. It is our reconstruction of that algorithm, which other versions are measured against."""

from __future__ import annotations

import gc

import torch
import torch.nn.functional as F
from step_size import CLIP, DECAY, DROPOUT, EPSILON, RATE, TAR, Size
from torch import Tensor, nn

from nni_darts_rnn.cell import variational_mask
from nni_darts_rnn.genotype import PRIMITIVES


class OriginalModel(nn.Module):
    """The supernet as published code writes it: a loop over nodes, in it one over primitives, `torch.cat` of the states, log-softmax of all logits."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        H, N = size.H, size.N
        self.encoder = nn.Embedding(size.V, H)
        self.decoder = nn.Linear(H, size.V)
        self.decoder.weight = self.encoder.weight
        self.W0 = nn.Parameter(torch.empty(2 * H, 2 * H).uniform_(-0.04, 0.04))
        self.Ws = nn.ParameterList([nn.Parameter(torch.empty(H, 2 * H).uniform_(-0.04, 0.04)) for _ in range(N)])
        self.bn = nn.BatchNorm1d(H, affine=False)
        nn.init.uniform_(self.encoder.weight, -0.04, 0.04)
        nn.init.zeros_(self.decoder.bias)
        self.alpha = (1e-3 * torch.randn(N * (N + 1) // 2, len(PRIMITIVES))).requires_grad_()

    def rebuilt(self, theta: Tensor) -> OriginalModel:
        """A new model with the weights in the flat vector `theta`.

        The tied weight alone keeps its old value: the state dict has it under a second name, which is loaded last, as in the published code.
        """
        model, at, state = OriginalModel(self.size), 0, self.state_dict()
        for name, p in self.named_parameters():
            state[name] = theta[at:at + p.numel()].view_as(p)
            at += p.numel()
        model.load_state_dict(state)
        model.alpha.data.copy_(self.alpha.data)
        return model

    def step(self, x: Tensor, h: Tensor, p: Tensor, mask_x: Tensor, mask_h: Tensor) -> Tensor:
        c, z = torch.split(torch.cat([x * mask_x, h * mask_h], -1).mm(self.W0), self.size.H, -1)
        s0 = h + c.sigmoid() * (z.tanh() - h)
        states, row = self.bn(s0).unsqueeze(0), 0
        for i, W in enumerate(self.Ws):
            masked = states * mask_h.unsqueeze(0)
            c, z = torch.split(masked.view(-1, self.size.H).mm(W).view(i + 1, -1, 2 * self.size.H), self.size.H, -1)
            c, s = c.sigmoid(), torch.zeros_like(s0)
            for k, name in enumerate(PRIMITIVES):
                if name == "none":
                    continue
                f = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda v: v}[name]
                s = s + torch.sum(p[row:row + i + 1, k].unsqueeze(-1).unsqueeze(-1) * (states + c * (f(z) - states)), dim=0)
            states = torch.cat([states, self.bn(s).unsqueeze(0)], 0)
            row += i + 1
        return torch.mean(states[-self.size.N:], dim=0)

    def forward(self, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        e = F.embedding(x, self.encoder.weight)
        e = e * variational_mask(e[0], DROPOUT["dropout_i"], True)
        p, outputs = F.softmax(self.alpha, -1), []
        mask_x, mask_h = variational_mask(h, DROPOUT["dropout_x"], True), variational_mask(h, DROPOUT["dropout_h"], True)
        for t in range(len(x)):
            h = self.step(e[t], h, p, mask_x, mask_h)
            outputs.append(h)
        raw = torch.stack(outputs)
        dropped = raw * variational_mask(h, DROPOUT["dropout"], True)
        logits = F.log_softmax(self.decoder(dropped.view(-1, self.size.H)), -1)
        return F.nll_loss(logits, y.reshape(-1)), raw


class Original:
    """One search step a call: w′ is in a rebuilt model, the weights move in place by +R, −2R and +R, and the garbage collector runs twice a step."""

    def __init__(self, size: Size):
        self.model = OriginalModel(size)
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.weights, lr=RATE, weight_decay=DECAY)
        self.arch = torch.optim.Adam([self.model.alpha], lr=3e-3, weight_decay=1e-3)

    def __call__(self, train, valid) -> None:
        model, alpha = self.model, self.model.alpha
        gc.collect()
        grads = torch.autograd.grad(model(*train)[0], self.weights)
        theta = torch.cat([p.data.reshape(-1) for p in self.weights])
        clip = CLIP / (torch.cat([g.reshape(-1) for g in grads]).norm() + 1e-6)
        unrolled = model.rebuilt(theta - RATE * (clip.clamp(max=1) * torch.cat([g.reshape(-1) for g in grads]) + DECAY * theta))
        unrolled(*valid)[0].backward()
        direct = unrolled.alpha.grad
        vector = [p.grad.data for p in unrolled.parameters()]
        torch.nn.utils.clip_grad_norm_(unrolled.parameters(), CLIP)
        R = EPSILON / torch.cat([v.reshape(-1) for v in vector]).norm()
        ends = []
        for factor in (1, -2):
            for p, v in zip(self.weights, vector):
                p.data.add_(v, alpha=float(factor * R))
            ends.append(torch.autograd.grad(model(*train)[0], alpha)[0])
        for p, v in zip(self.weights, vector):
            p.data.add_(v, alpha=float(R))
        alpha.grad = direct - RATE * clip * (ends[0] - ends[1]) / (2 * R)
        self.arch.step()
        self.optimizer.zero_grad()
        loss, raw = model(*train)
        (loss + TAR * (raw[1:] - raw[:-1]).pow(2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        gc.collect()
