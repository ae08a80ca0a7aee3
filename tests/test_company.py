"""What a solve has to get along with: autocast, transforms, hooks, copies, processes."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fields import Y0, Field, T, assert_close, loss_of
from torch import Tensor, nn

import pyode

ROUGH = {"rtol": 1e-4, "atol": 1e-5}
HERE = Path(__file__).parent


def direct(func, y0, t, **kwargs):
    return pyode.odeint(func, y0, t, **ROUGH, **kwargs)


def checkpoint(func, y0, t, **kwargs):
    return pyode.odeint(func, y0, t, options={"gradient": "checkpoint"}, **ROUGH, **kwargs)


def recomputing(func, y0, t, **kwargs):
    return pyode.odeint(func, y0, t, options={"gradient": "checkpoint", "graph_bytes": 0}, **ROUGH, **kwargs)


def implicit(func, y0, t, gradient="checkpoint", **kwargs):
    options = {"gradient": gradient, "step_size": 0.1, "newton_tol": 0.1}  # bfloat16 does not come closer
    return pyode.odeint(func, y0, t, method="trapezoid", options=options, **kwargs)


def implicit_direct(func, y0, t, **kwargs):
    return implicit(func, y0, t, "direct", **kwargs)


def adjoint(func, y0, t, **kwargs):
    return pyode.odeint_adjoint(func, y0, t, **ROUGH, **kwargs)


class BySamples:
    """solve_ivp with a step size for each sample, in odeint's place."""

    def __init__(self, gradient: str) -> None:
        self.gradient, self.__name__ = gradient, f"{gradient} by samples"

    def __call__(self, func, y0, t, **kwargs):
        return pyode.solve_ivp(func, y0, t, gradient=self.gradient, **ROUGH, **kwargs).ys


JOINT = (direct, checkpoint, recomputing, adjoint)
BY_SAMPLES = tuple(map(BySamples, ("direct", "checkpoint", "adjoint")))
ALL = (*JOINT, *BY_SAMPLES)
GRADIENTS = pytest.mark.parametrize("odeint", ALL, ids=lambda solve: solve.__name__)


class Net(nn.Module):
    """A small network as dynamics, of times 0-dim or [B]."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype)

    def forward(self, t: Tensor, y: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        return factor * self.outer(torch.tanh(self.inner(y)) + t.reshape(-1, 1))


class Model(nn.Module):
    """A network that holds a solve."""

    def __init__(self, odeint=direct, func: nn.Module | None = None) -> None:
        super().__init__()
        self.func, self.odeint = Net() if func is None else func, odeint
        self.head = nn.Linear(2, 1, dtype=torch.float64)
        self.register_buffer("times", T)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odeint(self.func, 2 * x, self.times)[-1])


def gradients_of(model: nn.Module, call=None) -> list[Tensor]:
    """Of the parameters and the input."""
    x = Y0.clone().requires_grad_()
    y = (model if call is None else call)(x)
    return list(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("odeint", [*ALL, implicit, implicit_direct], ids=lambda solve: solve.__name__)
@pytest.mark.parametrize("inside", [True, False], ids=["forward pass", "backward pass"])
def test_autocast_is_in_both_passes_what_it_was_in_the_forward_pass(odeint, inside, device):
    func, y0, seen = Net(torch.float32).to(device), Y0.to(device, torch.float32).requires_grad_(), []
    func.inner.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=inside):
        y = odeint(func, y0, T.to(device, torch.float32))
    assert y.dtype == torch.float32
    forward = len(seen)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not inside):
        torch.autograd.grad(y.square().sum(), [y0, *func.parameters()])
    assert set(seen) == {torch.bfloat16 if inside else torch.float32}
    assert (len(seen) > forward) == (odeint in (recomputing, implicit, implicit_direct, adjoint, BY_SAMPLES[2]))


@pytest.mark.parametrize("odeint", [checkpoint, recomputing, BY_SAMPLES[1]], ids=lambda solve: solve.__name__)
def test_under_autocast_checkpoint_has_the_direct_gradient(odeint, device):
    func, y0 = Net(torch.float32).to(device), Y0.to(device, torch.float32).requires_grad_()
    found = []
    for solve in (odeint, BY_SAMPLES[0] if odeint in BY_SAMPLES else direct):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = solve(func, y0, T.to(device, torch.float32))
        found.append(torch.autograd.grad(y.square().sum(), [y0, *func.parameters()]))
    for ours, theirs in zip(*found):  # rounded in bfloat16, in other orders
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@GRADIENTS
@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_around_a_solve(odeint, reentrant):
    model = Model(odeint)

    def call(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    def gradients(call):
        x = Y0.clone().requires_grad_()
        model.zero_grad()
        call(x).square().sum().backward()  # the reentrant kind knows no torch.autograd.grad
        return [x.grad, *(p.grad for p in model.parameters())]

    assert_close(gradients(call), gradients(model), 1e-12)


def test_torch_checkpoint_keeps_no_states_of_a_checkpointed_solve():
    kept = []

    def pack(x):
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        checkpoint(Net(), Y0, T)
    assert kept.count(Y0.shape) >= 3  # the steps' states are saved as autograd's own, for whoever wants to move them


@pytest.mark.parametrize("odeint", [*ALL, implicit, implicit_direct], ids=lambda solve: solve.__name__)
@pytest.mark.parametrize("args", [(), (torch.tensor(0.5, dtype=torch.float64),)], ids=["without args", "with args"])
def test_functional_call(odeint, args):
    # In the backward pass the modules have their own parameters again, and are lent those of the call.
    model = Model(partial(odeint, args=args))
    other = {name: (0.5 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, other, (Y0,))
    found = torch.autograd.grad(y.square().sum(), list(other.values()))
    scaled = copy.deepcopy(model)
    scaled.load_state_dict(dict(other), strict=False)
    expected = torch.autograd.grad(scaled(Y0).square().sum(), list(scaled.parameters()))
    assert_close(list(found), list(expected), 1e-12)


class TestTransforms:
    """torch.func and forward mode, of direct mode: by the reference ops."""

    @staticmethod
    def loss(weight: Tensor, y0: Tensor) -> Tensor:
        return pyode.odeint(lambda t, y: torch.sin(y @ weight), y0, T, **ROUGH, options={"first_step": 0.1}).sum()

    WEIGHT = torch.tensor([[0.3, 1.0], [-1.2, 0.1]], dtype=torch.float64)

    def test_grad_and_jacrev(self):
        weight = self.WEIGHT.clone().requires_grad_()
        (expected,) = torch.autograd.grad(self.loss(weight, Y0), weight)
        assert torch.allclose(torch.func.grad(self.loss)(self.WEIGHT, Y0), expected, rtol=1e-10)
        assert torch.allclose(torch.func.jacrev(self.loss)(self.WEIGHT, Y0), expected, rtol=1e-10)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_jvp(self):
        direction = torch.ones_like(self.WEIGHT)
        gradient = torch.func.grad(self.loss)(self.WEIGHT, Y0)
        _, tangent = torch.func.jvp(lambda w: self.loss(w, Y0), (self.WEIGHT,), (direction,))
        assert float(tangent) == pytest.approx(float((gradient * direction).sum()), rel=1e-9)

    @pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
    @pytest.mark.parametrize(
        "odeint", [checkpoint, adjoint, *BY_SAMPLES[1:], implicit_direct], ids=lambda solve: solve.__name__
    )
    def test_other_ways_to_a_gradient_say_that_they_are_not_for_them(self, transform, odeint):
        def loss(weight):
            return odeint(lambda t, y: torch.sin(y @ weight), Y0, T).sum()

        with pytest.raises(pyode.InvalidValue, match=r"torch\.func's grad, jvp and vmap"):
            transform(loss)(self.WEIGHT)

    def test_vmap_of_grad_with_fixed_steps(self):
        def loss(weight, y0):
            return pyode.odeint(lambda t, y: torch.sin(y @ weight), y0, T, method="rk4").sum()

        together = torch.func.vmap(torch.func.grad(loss), (None, 0))(self.WEIGHT, Y0)
        apart = torch.stack([torch.func.grad(loss)(self.WEIGHT, y0) for y0 in Y0])
        assert torch.allclose(together, apart, rtol=1e-12)


@GRADIENTS
def test_gradient_hooks_see_the_whole_gradient_once(odeint):
    seen = []

    def gradients(hooked):
        field, y0 = Field(), Y0.clone().requires_grad_()
        if hooked:
            field.rate.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
            field.matrix.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loss_of(odeint(field, y0, T)).backward()
        return field.rate.grad, field.matrix.grad

    (rate, matrix), plain = gradients(True), gradients(False)
    assert len(seen) == 2
    assert torch.equal(rate, 2 * plain[0])
    assert torch.equal(matrix, plain[1])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("odeint", [*ALL, implicit, implicit_direct], ids=lambda solve: solve.__name__)
def test_anomaly_mode(odeint):
    model = Model(odeint)
    expected = gradients_of(model)
    with torch.autograd.set_detect_anomaly(True):
        found = gradients_of(model)
    assert_close(found, expected, 1e-12)


@GRADIENTS
def test_copies_and_files_of_a_module_that_holds_a_solver(odeint):
    model = Model(odeint)
    expected = gradients_of(model)  # a solve before, so that nothing it leaves behind is in the way
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_close(gradients_of(other), expected, 0.0)


@GRADIENTS
def test_shared_and_frozen_parameters(odeint):
    # The weight serves twice; half of the rest is frozen.
    def build():
        net = Net()
        net.outer.weight = nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8))
        net.inner.weight = nn.Parameter(net.outer.weight.detach().T.clone())
        net.inner.bias.requires_grad_(False)
        net.extra = net.outer
        return net

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.net = build()
            self.first = self.second = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, t, y):
            return self.net.extra(torch.tanh(self.net.inner(self.first(y)))) + self.second(y)

    def gradients(odeint):
        func = Shared()
        loss_of(odeint(func, Y0, T)).backward()
        assert func.net.inner.bias.grad is None
        return [p.grad for p in func.parameters() if p.requires_grad]

    tolerance = 1e-2 if "adjoint" in odeint.__name__ else 1e-10  # the adjoint's, at rough tolerances
    same_steps = BY_SAMPLES[0] if odeint in BY_SAMPLES else direct
    assert_close(gradients(odeint), gradients(same_steps), tolerance)


class Scaled(Net):
    """With a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.5, 2.0], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.scale * super().forward(t, y)


@GRADIENTS
def test_buffers_are_used_in_both_passes_and_may_be_lent(odeint):
    model, lent = Model(odeint, Scaled()), {"func.scale": torch.ones(2, dtype=torch.float64)}
    found = gradients_of(model, lambda x: torch.func.functional_call(model, lent, (x,)))
    own = gradients_of(model)
    plain = Model(odeint)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert_close(found, gradients_of(plain), 1e-12)
    assert not torch.allclose(found[0], own[0], rtol=1e-2)


WORKER = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from test_company import ALL, BY_SAMPLES, Model, steps_of
from fields import assert_close

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
# The second process has a state that moves faster, and takes more steps.
batch = torch.tensor([[[1.0, -2.0], [0.5, 0.3]], [[8.0, 5.0], [-9.0, 4.0]]], dtype=torch.float64)
for odeint in ALL:
    torch.manual_seed(0)
    by_samples = odeint in BY_SAMPLES
    model = Model(odeint)
    with torch.no_grad():
        for p in model.func.parameters():
            p.mul_(4)
    steps = torch.tensor([steps_of(model.func, batch[rank], by_samples)])
    both = [torch.empty_like(steps) for _ in range(2)]
    dist.all_gather(both, steps)
    assert both[0] != both[1], both
    apart = DistributedDataParallel(model)
    apart(batch[rank]).square().sum().backward()
    found = [2 * p.grad for p in model.parameters()]  # the processes' mean
    model.zero_grad()
    # With a step size for each sample they are those of the batch in one piece; else of its parts in one process.
    for part in [batch.flatten(0, 1)] if by_samples else batch:
        model(part).square().sum().backward()
    assert_close(found, [p.grad for p in model.parameters()], 1e-12)
dist.destroy_process_group()
"""


def steps_of(func: nn.Module, y0: Tensor, by_samples: bool) -> int:
    """How many a solve accepts."""
    stats = pyode.Stats()
    options = {"stats": stats, "control": "per_sample" if by_samples else "joint"}
    with torch.no_grad():
        pyode.odeint(func, 2 * y0, T, **ROUGH, options=options)
    return stats.n_accepted


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_under_torchrun_have_the_gradients_of_one(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


SHORT_OF_THREADS = """
import os
import resource

import torch

from pyode._ops import native

torch.set_num_threads(3)  # which makes some
n = 1 << 17
y, k, dt = torch.rand(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
layout = native.Layout(1, n, (0, n), y.dtype, y.device)
before = len(os.listdir("/proc/self/task"))
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
# There is room for the result and for one thread's stack of 8 MB, not for a second one's.
resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**22, resource.RLIM_INFINITY))
found = native.stage_combine(layout, (1.0,), y, [k], dt)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert len(os.listdir("/proc/self/task")) == before + 1
assert torch.equal(found, y + k)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and counts of threads as Linux has them")
def test_where_the_system_refuses_threads_those_that_there_are_do_the_work():
    def small_stacks():
        import resource

        resource.setrlimit(resource.RLIMIT_STACK, (1 << 23, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_THREADS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=small_stacks,
    )
    assert done.returncode == 0, done.stderr
