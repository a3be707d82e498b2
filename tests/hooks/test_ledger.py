"""Every assignment into somebody else's module or class is in the ledger, and nothing else is."""

import ast
from pathlib import Path

import jettison.hooks
from jettison.hooks.ledger import PATCHES

ROOT = Path(jettison.hooks.__file__).parent.parent
OURS = ("jettison", ".")


def patches_in(source):
    """Return the dotted foreign names that a module's source assigns to, directly or through setattr."""
    tree = ast.parse(source)
    foreign = _foreign_names(tree)
    found = set()
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            found |= {_dotted(target, foreign) for target in targets if isinstance(target, ast.Attribute)}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else "*"
            base = _dotted(node.args[0], foreign)
            found |= {base and f"{base}.{name}"}
    return {name for name in found if name}


def _foreign_names(tree):
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # NOTES: engine classes reach the rooms through `compat`, so what comes from there is foreign.
            if module.startswith(OURS) and not module.endswith("compat"):
                continue
            names |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return {
        name: dotted for name, dotted in names.items() if not dotted.startswith("jettison.hooks.vllm.compat.compat")
    }


def _dotted(node, foreign):
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, foreign)
        return base and f"{base}.{node.attr}"
    return foreign.get(node.id) if isinstance(node, ast.Name) else None


def test_the_search_finds_patches():
    source = (
        "import vllm.config as c\nimport torch\nfrom vllm.a import B\nfrom jettison.hooks import x\n"
        "from jettison.hooks.vllm.compat import Attention\n"
        "c.VllmConfig.f = 1\nsetattr(B, 'g', 2)\ntorch.x += 1\nx.y = 3\nself.z = 4\nAttention.forward = 5\n"
    )
    assert patches_in(source) == {
        "vllm.config.VllmConfig.f", "vllm.a.B.g", "torch.x", "jettison.hooks.vllm.compat.Attention.forward"
    }  # fmt: skip


def test_ledger_is_complete_in_both_directions():
    files = [file for room in ("hooks", "plugins", "csrc") for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 20
    found = {name: file for file in files for name in patches_in(file.read_text(encoding="utf-8"))}
    listed = {patch.target for patch in PATCHES}
    assert found.keys() == listed, f"not in the ledger: {set(found) - listed}; not in the code: {listed - set(found)}"


def test_entries_say_everything():
    assert all(patch.why and patch.upstream and patch.remove_when for patch in PATCHES)
