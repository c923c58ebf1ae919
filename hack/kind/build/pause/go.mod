module refold.dev/hack/kind/build/pause

go 1.26.0
