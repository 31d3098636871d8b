"""The field's measures of answers, as plain functions of predictions and truths."""
