"""Is an artefact still the model that was trained? Read back from the disk, compared, said."""
