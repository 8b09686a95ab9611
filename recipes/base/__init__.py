"""How the bundled base model is made: picture world, captions, training stages, judges, export."""
