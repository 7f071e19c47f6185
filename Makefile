# The two commands a newcomer needs: `make run` and `make test`.
GO            ?= go
GOLANGCI_LINT := v2.15.0
TOOLS         := $(CURDIR)/.tools

.PHONY: run build test test-long lint fuzz bench bench-convert bench-node bench-start clean tools setup

run: build ## start accel with an embedded registry under ./accel-data
	./bin/accel up

build: ## build bin/accel
	$(GO) build -trimpath -o bin/accel ./cmd/accel

setup: ## install what the tests and benchmarks drive (says which and why)
	./internal/e2e/setup.sh

test: setup ## everything that belongs in CI, with the race detector
	$(GO) vet ./...
	$(GO) test -race -timeout 40m ./...

test-long: setup ## giants and long kill loops; prints how often each ran
	ACCEL_TEST_LONG=1 $(GO) test -timeout 90m -v -run 'Long' ./...

lint: $(TOOLS)/golangci-lint-$(GOLANGCI_LINT)
	$(TOOLS)/golangci-lint-$(GOLANGCI_LINT) run ./...

$(TOOLS)/golangci-lint-$(GOLANGCI_LINT):
	GOBIN=$(TOOLS) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT)
	mv $(TOOLS)/golangci-lint $@

fuzz: ## each fuzz target for a minute
	@for pkg in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
	    echo "$$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime 60s -fuzzminimizetime 5x $$pkg || exit 1; \
	  done; done

bench: build ## the service's figures; rows go to bench/out/serve.jsonl too
	$(GO) run ./bench/serve

bench-convert: ## conversion of a 1 GB image next to the stock library and gzip
	$(GO) run ./bench/convert

bench-node: build ## 100 pulls at once through the node's mirror next to the bare registry; its memory and start
	$(GO) run ./bench/node

bench-start: setup build ## starts of containers by accel and its peers over a shaped network; as root
	$(GO) run ./bench/start

clean:
	rm -rf bin bench/out
