"""Every code of a finding: what it means (`table`), how grave it is (`severities`), an example (`examples`)."""
