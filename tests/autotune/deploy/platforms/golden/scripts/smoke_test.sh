#!/bin/sh
# Does the server answer? Started by: docker compose up -d
# URL, MODEL and WAIT (seconds) may be set; API_KEY too, if the server wants one.
set -eu
URL=${URL:-http://127.0.0.1:8000}
MODEL=${MODEL:-'Example 1B'}
WAIT=${WAIT:-900}

ask() {  # the key goes through a pipe, so that no list of processes shows it
  if [ -n "${API_KEY:-}" ]; then
    printf 'header = "Authorization: Bearer %s"\n' "$API_KEY" |
      curl --config - --silent --show-error --fail --max-time 120 "$@"
  else
    curl --silent --show-error --fail --max-time 120 "$@"
  fi
}

fail() { echo "smoke test failed: $1" >&2; exit 1; }

waited=0
until curl --silent --fail --max-time 5 --output /dev/null "$URL/health"; do
  [ "$waited" -lt "$WAIT" ] || fail "$URL/health does not answer after $WAIT s"
  sleep 1
  waited=$((waited + 1))
done
ask "$URL/v1/models" | grep --fixed-strings --quiet "\"$MODEL\"" ||
  fail "/v1/models does not name $MODEL"
body="{\"model\": \"$MODEL\", \"prompt\": \"Once upon a time\", \"max_tokens\": 8}"
answer=$(ask "$URL/v1/completions" --header "Content-Type: application/json" \
  --data "$body") || fail "no completion"
printf %s "$answer" | grep --quiet '"completion_tokens": *[1-9]' ||
  fail "a completion without tokens: $answer"
echo "smoke test passed: $MODEL at $URL"
