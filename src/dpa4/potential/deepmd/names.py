"""Names of the network's parameters in deepmd-kit checkpoints."""

import re

from dpa4.model.config import ModelConfig

# Rules (pattern of our name, deepmd-kit's name), of which the first match applies. `deepmd_name` resolves the
# prefixes of blocks, convolutions and feed-forward networks, which have their own rules.
_NETWORK = (
    (r"types\.table", r"descriptor.type_embedding.adam_type_embedding"),
    (
        r"charge_spin\.(charge|spin)\.table",
        r"descriptor.charge_spin_embedding.\1_embedding.adam_type_embedding",
    ),
    (r"charge_spin\.mix\.weight", r"descriptor.charge_spin_embedding.mix_layer.matrix"),
    (r"charge_spin\.mix\.bias", r"descriptor.charge_spin_embedding.mix_layer.bias"),
    (r"seed\.(scale|shift)_norm\.scale", r"descriptor.film_\1_norm.adam_scale"),
    (r"seed\.(scale|shift)_strength", r"descriptor.film_\1_strength_log"),
    (r"seed\.types\.table", r"descriptor.env_seed_embedding.env_type_embed.adam_type_embedding"),
    (r"seed\.basis_in\.(weight|bias)", r"descriptor.env_seed_embedding.rbf_proj_layer1.\1"),
    (r"seed\.basis_out\.(weight|bias)", r"descriptor.env_seed_embedding.rbf_proj_layer2.\1"),
    (r"seed\.pair_in\.(weight|bias)", r"descriptor.env_seed_embedding.g_layer1.\1"),
    (r"seed\.pair_out\.(weight|bias)", r"descriptor.env_seed_embedding.g_layer2.\1"),
    (r"seed\.output\.weight", r"descriptor.env_seed_embedding.output_proj.weight"),
    (r"basis\.frequencies", r"descriptor.radial_basis.adam_freqs"),
    (
        r"energy\.hidden\.(\d+)\.(weight|bias)",
        r"fitting_net.filter_layers.networks.0.hidden_layers.\1.linear.\2",
    ),
    (r"energy\.output\.weight", r"fitting_net.filter_layers.networks.0.output_layer.weight"),
)
_FEED_FORWARD = (
    (r"linear_in\.", r"so3_linear_1."),
    (r"linear_out\.", r"so3_linear_2."),
    (r"activation\.linear\.", r"act.gate_linear."),
    (r"activation\.operation\.(left|right|out)\.", r"act.grid_op.\1_proj."),
    (r"activation\.operation\.router\.", r"act.grid_op.router."),
    (r"activation\.scalar_gate\.", r"act.scalar_gate."),
)
_CONVOLUTION = (
    (r"pre_mix\.", r"pre_focus_mix."),
    (r"post_mix\.", r"post_focus_mix."),
    (r"radial_hidden\.", r"radial_hidden_proj."),
    (r"product\.", r"radial_degree_mixer."),
    (r"stack\.linears\.(\d+)\.bias", r"so2_linears.\1.bias0"),
    (r"stack\.linears\.", r"so2_linears."),
    (r"stack\.gates\.(\d+)\.linear\.", r"non_linearities.\1.gate_linear."),
    (r"stack\.scales\.", r"adam_so2_layer_scales."),
    (r"focus\.weight", r"adamw_focus_compete_w"),
    (r"focus\.norm\.scale", r"focus_compete_norm.adam_scale"),
    (r"focus\.bias", r"focus_compete_bias"),
    (r"attention\.qk_norm\.scale", r"attn_qk_norm.adam_scale"),
    (r"attention\.gate_norm\.scale", r"attn_output_gate_norm.adam_scale"),
    (r"attention\.query\.", r"attn_q_proj."),
    (r"attention\.key\.", r"attn_k_proj."),
    (r"attention\.radial_logit", r"adamw_attn_logit_w"),
    (r"attention\.null_logit", r"adamw_attn_z_bias_raw"),
    (r"attention\.gate_logit", r"adamw_attn_gate_w"),
    (r"node_product\.expand\.", r"message_node_grid_product.frame_expand."),
    (r"node_product\.contract\.", r"message_node_grid_product.frame_contract."),
    (r"node_product\.operation\.(left|right|out)\.", r"message_node_grid_product.grid_op.\1_proj."),
    (r"node_product\.operation\.router\.", r"message_node_grid_product.grid_op.router."),
    (r"node_product\.", r"message_node_grid_product."),
)
_BLOCK = (
    (r"conv_norm_in\.", r"pre_so2_norm."),
    (r"conv_norm_out\.", r"post_so2_norm."),
    (r"ffn_norms_in\.", r"pre_ffn_norms."),
    (r"ffn_norms_out\.", r"post_ffn_norms."),
    (r"ffn_scales\.", r"adam_ffn_layer_scales."),
)
_MATRIX = ("rbf_proj_layer", "g_layer", "output_proj.weight", "mix_layer", ".linear.weight", "output_layer")


def deepmd_name(name: str, config: ModelConfig) -> str:
    """Name of a parameter of `dpa4.model.DPA4` in a checkpoint, behind ``model.<branch>.atomic_model.``.

    Raises:
        KeyError: If the name is not one of the network's parameters.
    """
    if match := re.fullmatch(r"radial\.(hidden|norms)\.(\d+)\.(weight|scale)|radial\.last\.weight", name):
        stride = 3 if config.edge_norm.radial else 2
        layer = len(config.radial_mlp) if match[1] is None else int(match[2])
        leaf = f"{stride * layer + 1}.adam_scale" if match[1] == "norms" else f"{stride * layer}.matrix"
        return f"descriptor.radial_embedding.net.{leaf}"
    if match := re.fullmatch(r"blocks\.(\d+)\.conv\.(.*)", name):
        return f"descriptor.blocks.{match[1]}.so2_conv.{_rename(match[2], _CONVOLUTION)}"
    if match := re.fullmatch(r"blocks\.(\d+)\.ffns\.(\d+)\.(.*)", name):
        return f"descriptor.blocks.{match[1]}.ffns.{match[2]}.{_rename(match[3], _FEED_FORWARD)}"
    if match := re.fullmatch(r"blocks\.(\d+)\.(.*)", name):
        leaf = _rename(match[2], _BLOCK)
        return f"descriptor.blocks.{match[1]}." + re.sub(r"\.scale$", ".adam_scale", leaf)
    if match := re.fullmatch(r"readout\.(\d+)\.(.*)", name):
        last = int(match[1]) == config.readout_layers - 1
        module = "output_ffn" if last else f"readout_pre_layers.{match[1]}"
        return f"descriptor.{module}.{_rename(match[2], _FEED_FORWARD)}"
    renamed = _rename(name, _NETWORK)
    if any(part in renamed for part in _MATRIX):
        renamed = re.sub(r"\.weight$", ".matrix", renamed)
    return renamed


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name)
    raise KeyError(name)
