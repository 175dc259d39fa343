"""What ``torch.compile(model)`` leaves working: the wrapper trains and saves as the model that it wraps.

Only for callers that compile the whole model, as the README's training sample does. Compiling a stage needs none of
it: ``model.train(data, compiler=torch.compile)``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


def keep_methods(cls: type[nn.Module]) -> None:
    """Hands ``train`` and the state's plain names through ``torch.compile``'s wrapper of models of that class.

    The wrapper is an `nn.Module` of its own, whose methods hide the model's: ``train(data)`` would be an error,
    and names of the state would begin with ``_orig_mod.``.
    """

    def hand_through(wrapper: nn.Module, name: str, model: nn.Module | None) -> None:
        if name != "_orig_mod" or not isinstance(model, cls):
            return

        def train(data: Any = True, *stages: Any, **settings: Any) -> Any:
            if isinstance(data, bool):
                model.train(data, **settings)
                return wrapper
            compiler: Any = wrapper.dynamo_ctx  # what the caller gave torch.compile
            train_model: Any = model.train
            return train_model(data, *stages, compiler=compiler, **settings)

        # Not setattr, which the wrapper passes on to the model.
        methods = {"train": train, "state_dict": model.state_dict, "load_state_dict": model.load_state_dict}
        wrapper.__dict__.update(methods)

    register_module_module_registration_hook(hand_through)
