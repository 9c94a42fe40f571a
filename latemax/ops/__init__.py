"""The operator: a call as data (problem), the choice and launch (dispatch, backends), torch's view of it (operator)."""
