"""The tiny model's MoE blocks with one module per expert, as transformers 4 had them and as the checkpoint names them.

transformers 5 fuses the experts of a layer into two tensors. One module per expert lets a quantiser
calibrate each expert's input on its own, and lets the weights of one expert be replaced.
"""
import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP


class Qwen3MoeSparseMoeBlock(nn.Module):  # ModelOpt knows the projections of a block by its name
    def __init__(self, config, fused):
        super().__init__()
        self.gate = fused.gate
        self.experts = nn.ModuleList(Qwen3MoeMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        for expert, gate_up, down in zip(self.experts, fused.experts.gate_up_proj, fused.experts.down_proj):
            gate, up = gate_up.detach().chunk(2)  # [2I, H] -> [I, H] each
            for linear, weight in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, down.detach())):
                linear.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, hidden_states):  # [B, T, H] -> [B, T, H]
        hidden = hidden_states.flatten(0, -2)
        _, weights, picks = self.gate(hidden)  # [B*T, k]
        output = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            token, pick = torch.where(picks == index)
            if token.numel():
                output.index_add_(0, token, expert(hidden[token]) * weights[token, pick, None])
        return output.view_as(hidden_states)


def unfuse(model):
    """Replaces every fused MoE block of `model` in place and returns it."""
    for layer in model.model.layers:
        layer.mlp = Qwen3MoeSparseMoeBlock(model.config, layer.mlp)
    return model
