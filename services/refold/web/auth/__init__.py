"""Who may call what: the ways to decide it.

An `App` asks in two steps, which every way answers (`access.Authority`): who sends this bearer token (401 where nobody
known does), and may that caller do `create` on `eventstreams/events` of `shop/orders` (403 where not)? Nothing is asked
for the probes.

Modules: `access` (what is asked, and the answers to a refusal), `choice` (from the setting `REFOLD_AUTH` to a way),
and the ways: `kubernetes` (TokenReview and SubjectAccessReview, by `reviews`, remembered in `expiring`), `tokens` (a
file of tokens) and `everyone` (no check). The last two are for running without a cluster.
"""
