"""A plugin by a stranger: the first and the last layers keep more bits in the KV cache than those between them."""

from jettison.hooks import AttentionLayer, KVFormat, PluginOptions, hookimpl


class EdgesOptions(PluginOptions):
    """Section `edges` of the jettison options."""

    edge_bits: int = 8
    middle_bits: int = 4


class Edges:
    """The hooks of one engine."""

    def __init__(self, options: EdgesOptions) -> None:
        self.options = options

    @hookimpl
    def kv_cache_format(self, layer: AttentionLayer) -> KVFormat:
        edge = layer.index in (0, layer.num_layers - 1)
        bits = self.options.edge_bits if edge else self.options.middle_bits
        return KVFormat(bits, bits, rotate=True)


@hookimpl
def options() -> type[EdgesOptions]:
    return EdgesOptions


@hookimpl
def activate(options: EdgesOptions) -> Edges:
    return Edges(options)
