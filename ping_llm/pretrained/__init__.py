"""The model in the box: its recipe, and beside it its weights and config, an export."""
