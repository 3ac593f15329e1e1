"""What the name of a tensor says: its role and its layer. The names are llama.cpp's."""

from __future__ import annotations

import re

# --- the role of a name ---------------------------------------------------------------------------------------------

ROLES = ("attention", "ssm", "router", "norm", "shared_expert", "expert", "ffn", "embedding", "output", "mtp", "other")

# fmt: off
# First match wins. The name is without "blk.N." and without what follows the last word (".weight", ".bias", ...).
_ROLE_PATTERNS = tuple((role, re.compile(pattern)) for role, pattern in (
    ("mtp", r"nextn\."),
    ("norm", r"(.*[._])?norm\d?(_[a-z0-9]+)*$"),                         # attn_norm, post_ffw_norm_1, ffn_norm_exps
    ("shared_expert", r"ffn_(gate|up|down|gate_up|gate_inp)_shexp$"),
    ("expert", r"ffn_(gate|up|down|gate_up)_(exps|chexps)$"),
    ("expert", r"ffn_(gate|up|down)\.[0-9]+$"),                             # one tensor per expert: files of 2023
    ("router", r"(ffn_gate_inp|exp_probs_b|exp_probs_b_vl|ffn_gate_tid2eid)$"),
    ("attention", r"(vis_|cross_)?attn_|indexer[._]"),
    ("ssm", r"ssm_|shortconv\.|time_mix_"),
    ("ffn", r"ffn[._]|channel_mix_|vis_(gate|up|down)$"),
    ("embedding", r"(token_embd|per_layer_token_embd|position_embd|token_types)$"),
    ("output", r"(output|cls|cls\.output|dense_2|dense_3)$"),
))
# fmt: on
_IN_LAYER = re.compile(r"(?:(?:enc|dec)\.)?blk\.([0-9]+)\.(.+)", re.DOTALL)
_SUFFIX = re.compile(r"\.(weight|bias|scale|input_scale|a|b)$")


def role_of(name: str) -> str:
    """One of ROLES, from the name alone; a name that llama.cpp does not know is "other"."""
    match = _IN_LAYER.fullmatch(name)
    word = _SUFFIX.sub("", match[2] if match else name)
    return next((role for role, pattern in _ROLE_PATTERNS if pattern.match(word)), "other")


def layer_of(name: str) -> int | None:
    """N of "blk.N.": the decoder's layers, where experts are. None for every other name."""
    match = _IN_LAYER.fullmatch(name)
    return int(match[1]) if match and name.startswith("blk.") else None


def local_name(name: str) -> str:
    return name.split(".", 2)[2]
