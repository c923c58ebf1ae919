"""The admission webhook: refuses EventStreams and Projections that can't work before they are stored.

`main` is the process, `review` answers one AdmissionReview by the guard, `certificates` decides which authorities and
which serving certificate there are, and `keeping` brings that about in the cluster.
"""
