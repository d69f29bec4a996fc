"""vLLM's own reading of quantization_config, in its environment (environments.sh): no weights, no kernels.

    run_vllm_schemes.py < {"name": quantization_config, ...}

Prints {"name": {"experts": text, "attention": text}}: the class that vLLM chooses for the experts of a layer and for an
attention projection, "unquantized", or the error.
"""

import importlib
import json
import os
import pkgutil
import sys
from types import SimpleNamespace

HOME = "vllm.model_executor.layers.quantization.compressed_tensors"


class Chosen(Exception):
    """Carries the class out of its constructor, which would look for a kernel of this machine."""


def stop(self: object, *_: object, **__: object) -> None:
    raise Chosen(type(self).__name__)


def stop_at_constructors(package: str, ending: str) -> None:
    home = importlib.import_module(package)
    for found in pkgutil.iter_modules(home.__path__):
        try:
            module = importlib.import_module(f"{package}.{found.name}")
        except ImportError:  # for a GPU that this environment does not serve
            continue
        for name, value in vars(module).items():
            if isinstance(value, type) and name.endswith(ending) and value.__module__ == module.__name__:
                value.__init__ = stop


def verdict(ask) -> str:
    try:
        found = ask()
    except Chosen as chosen:
        return str(chosen)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "unquantized" if found is None else type(found).__name__


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to both streams
    import torch

    ours = importlib.import_module(f"{HOME}.compressed_tensors")
    moe = importlib.import_module(f"{HOME}.compressed_tensors_moe.compressed_tensors_moe")
    stop_at_constructors(f"{HOME}.compressed_tensors_moe", "MoEMethod")
    stop_at_constructors(f"{HOME}.schemes", "")
    moe.UnquantizedFusedMoEMethod.__init__ = stop
    layer = SimpleNamespace(
        ckpt_gate_proj_name="gate_proj", ckpt_up_proj_name="up_proj", ckpt_down_proj_name="down_proj", moe_config=None
    )
    experts = type("RoutedExperts", (torch.nn.Module,), {})()
    experts.__dict__.update(vars(layer))
    found = {}
    for name, config in json.load(sys.stdin).items():
        made = ours.CompressedTensorsConfig.from_config(config)
        made.packed_modules_mapping = {}
        at = "model.layers.0"
        found[name] = {
            "experts": verdict(
                lambda c=made, at=at: moe.CompressedTensorsMoEMethod.get_moe_method(c, experts, f"{at}.mlp.experts")
            ),
            "attention": verdict(
                lambda c=made, at=at: c.get_scheme(torch.nn.Linear(8, 8), layer_name=f"{at}.self_attn.o_proj")
            ),
        }
    with os.fdopen(out, "w") as stream:
        json.dump(found, stream, indent=1)


if __name__ == "__main__":
    main()
