"""The strategies, one file each. They enter qft by name, through the same door as third parties'."""
