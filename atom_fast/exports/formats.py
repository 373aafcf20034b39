"""The formats that a set is exported in, by name."""

from atom_fast.exports.ddranking import export_ddranking
from atom_fast.exports.eccv24 import export_eccv24
from atom_fast.exports.folder import export_folder
from atom_fast.exports.public import export_public

WRITERS = {"folder": export_folder, "pt": export_public, "ddranking": export_ddranking, "eccv24": export_eccv24}
