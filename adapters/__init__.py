"""The strategies, one file each; they enter qft by name, as third parties' do."""
