"""The network's repeated modules compiled, each size of them once: fewer kernels, which move fewer bytes.

Test: pytest tests/model/test_compile.py. Module by module, because the whole network would take many times as long; a
checkpointed module with its recomputation inside. Modules of one size share what is compiled: blocks.py and projection.py
keep what tells them apart (mixes, names of matrices) out of its way.
"""

from __future__ import annotations

from torch import nn

from toolkit.errors import UserError
from toolkit.model.blocks import ResBlock, Transformer

SIZES = 64  # of modules that may be compiled, with gradients and without; beyond that torch stops with an error


def compile_blocks(network: nn.Module) -> None:
    """Have a network of lean blocks (prepare.py), or a part of one, compiled as it is called, which takes some minutes.

    raises  UserError where there is no C++ compiler, which a GPU needs too
    """
    import torch._dynamo  # takes a second
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "compile is on, but there is no C++ compiler; install g++, name another in CXX, or leave it off"
        ) from None
    torch._dynamo.config.recompile_limit = max(SIZES, torch._dynamo.config.recompile_limit)
    for module in network.modules():
        if isinstance(module, ResBlock | Transformer):
            module.compile(fullgraph=True, dynamic=False)
