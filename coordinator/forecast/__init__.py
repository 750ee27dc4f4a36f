"""How much demand comes, with quantiles: cheap models, weighed by how right they were lately."""
