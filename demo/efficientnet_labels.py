"""Names of the ImageNet classes that the demonstration's pictures meet; the model's file carries no names."""

_NAMES = {
    281: "tabby", 282: "tiger cat", 283: "Persian cat", 284: "Siamese cat", 285: "Egyptian cat", 309: "bee",
    323: "monarch", 504: "coffee mug", 550: "espresso maker", 652: "military uniform", 657: "missile",
    659: "mixing bowl", 744: "projectile", 809: "soup bowl", 812: "space shuttle", 868: "tray", 923: "plate",
    925: "consomme", 960: "chocolate sauce", 967: "espresso", 968: "cup", 969: "eggnog", 985: "daisy",
}  # fmt: skip


def label(index: int) -> str:
    """The class's name, or its number."""
    return _NAMES.get(index, f"class {index}")
