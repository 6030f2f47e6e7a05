"""A trained model as a folder that timm loads: exported, described, published and loaded again."""
