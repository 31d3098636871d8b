"""Scripts whose words stand without spaces, so that a character takes the place of a word."""

from __future__ import annotations

import re

# Han ideographs and their extensions, kana, Thai; hangul is written with spaces
UNSPACED = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f\U00020000-\U0003134f]"
)
