"""What is made beside the main work is whole, and waits for nothing of it. Run: pytest tests/run/test_beside.py"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from toolkit.run.beside import Beside, find_tensors
from toolkit.run.framer import Condition, Task


@dataclass
class Made:
    numbers: Tensor
    name: str = "made"


def test_every_tensor_is_found() -> None:
    """In a training step's task and in the condition inside of it, optional ones too; other things are passed over."""
    tensors = [torch.full((2,), float(number)) for number in range(8)]
    condition = Condition(*tensors[:4], control_scale=0.5)
    task = Task(*tensors[4:], condition)
    assert sorted(tensor[0].item() for tensor in find_tensors(task)) == list(range(8))
    assert len(list(find_tensors(Task(*tensors[4:], Condition(*tensors[:3]))))) == 7


def test_without_a_gpu_it_is_a_call() -> None:
    made = Beside(torch.device("cpu"))(lambda: Made(torch.ones(2)))
    assert torch.equal(made.numbers, torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's; make gpu runs this on one")
def test_it_does_not_wait_for_the_main_work() -> None:
    """A copy from the host is there while the main stream is still busy; the main stream reads it when it is whole."""
    beside, device = Beside(torch.device("cuda")), torch.device("cuda")
    wanted = torch.arange(1 << 20, dtype=torch.float32)
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    busy.record()
    made = beside(lambda: Made(wanted.to(device)))
    assert not busy.query()
    assert torch.equal((made.numbers + 1).cpu(), wanted + 1)
