"""A braid as a Hugging Face causal language model: a thin face over HybridLM.

Legend: B batch rows, T tokens, L tokens before them, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from launch.export.configuration_braid import BraidConfig
from model.config import ModelConfig
from model.hybrid import HybridLM, ModelState, Precision
from model.params import ParamSpec, initialise


class BraidCache:
    """What decoding carries: recurrent states, convolution tails and windows of keys. seen: tokens read so far."""

    is_compileable = False

    def __init__(self, state: ModelState, seen: int) -> None:
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.state = self.state.rows(beam_idx)


class BraidForCausalLM(PreTrainedModel, GenerationMixin):
    """Loaded in float32, it computes in float32; with `dtype=torch.bfloat16`, matrices and matmuls are bfloat16, while
    decay, norms, softmax and logits stay float32, as in training."""

    config_class = BraidConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "ParallelBlock"]
    _is_stateful = True
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: BraidConfig) -> None:
        super().__init__(config)
        self.model = HybridLM(ModelConfig.from_dict(config.architecture))
        self._specs = {name: replace(spec, pad_rows=1) for name, spec in self.model.table().items()}
        for name, parameter in self.model.named_parameters():
            spec = self._specs[name]
            dtype = spec.dtype if spec.update == "vector" else torch.get_default_dtype()
            parameter.data = parameter.data[: spec.shape[0]].to(dtype, copy=True)  # without the padding of training
        vectors = {name for name, spec in self._specs.items() if spec.update == "vector"}
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in vectors}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draws what no checkpoint has filled, as training would."""
        prefix = next((name for name, found in self.model.named_modules() if found is module), None)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}"
            if name in self._specs and not getattr(parameter, "_is_hf_initialized", False):
                _draw(parameter, name, self._specs[name])

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        self.model.recompute = enable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.model.recompute)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes the cache

    def _reorder_cache(self, past_key_values: BraidCache, beam_idx: Tensor) -> BraidCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BraidCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids: (B, T) int64. attention_mask: (B, L + T), 0 at padding, which may stand on either side.
        position_ids: (B, T); a 0 begins a document, which sees nothing before it. labels: (B, T), -100 where nothing is
        predicted, not shifted. Logits are (B, T, V) float32."""
        residual = getattr(torch, self.config.residual_dtype)
        self.model.precision = Precision(self.model.embedding.weight.dtype, residual)
        starts = _starts(input_ids, attention_mask, position_ids, past_key_values)
        carry = not self.training if use_cache is None else use_cache
        hidden: list[Tensor] = []
        hooks = self._record(hidden) if output_hidden_states else []
        try:
            out = self.model(
                input_ids,
                starts,
                state=None if past_key_values is None else past_key_values.state,
                carry=carry,
                last_only=isinstance(logits_to_keep, int) and logits_to_keep == 1,
            )
        finally:
            for hook in hooks:
                hook.remove()
        logits = out.logits
        if isinstance(logits_to_keep, Tensor) or logits_to_keep > 1:
            logits = logits[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cache = None
        if carry:
            cache = BraidCache(out.state, input_ids.shape[1] + (past_key_values.seen if past_key_values else 0))
        result = CausalLMOutputWithPast(loss, logits, cache, tuple(hidden) or None)
        return result if return_dict in (None, True) else result.to_tuple()

    def _record(self, hidden: list[Tensor]) -> list[Any]:
        """Hooks that collect what each block reads, and what the head reads. (A shared block runs more than once.)"""

        def reads(module: nn.Module, inputs: Any) -> None:
            hidden.append(inputs[0])

        def gives(module: nn.Module, inputs: Any, output: Tensor) -> None:
            hidden.append(output)

        hooks = [block.register_forward_pre_hook(reads) for block in dict.fromkeys(self.model.blocks)]
        return [*hooks, self.model.norm.register_forward_hook(gives)]


def _starts(ids: Tensor, mask: Tensor | None, positions: Tensor | None, past: BraidCache | None) -> Tensor:
    """(B, T) bool: where a document begins. Padding on the left becomes a document of its own, which no layer lets the
    text after it see; a document that begins at padding is cut off the cache in the same way."""
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = past is None
    if positions is not None:
        starts |= positions.expand_as(ids) == 0
    if mask is not None and mask.dim() == 2:
        real = mask.bool()
        before = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], 1)
        starts |= (real & ~before)[:, -ids.shape[1] :]
    return starts


@torch.no_grad()
def _draw(parameter: Tensor, name: str, spec: ParamSpec) -> None:
    if parameter.device.type != "meta":
        initialise(parameter, name, spec, torch.initial_seed() & (2**63 - 1))
