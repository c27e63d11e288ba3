"""Access to the agents of test runs."""

from elastic_pt.runlog.access import Access, issue, new_authority

TLS = Access("secret", issue(new_authority(), "test", "test"))
PLAIN = Access("secret")
"""As with `elastic.tls = false`."""
