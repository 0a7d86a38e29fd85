.PHONY: dev
# Rebuild the editable install of the environment at hand.
dev:
	@.venv/bin/pip install -q --no-build-isolation --no-deps -e . 2>&1 | { grep -v ^WARNING || true; }
