#!/usr/bin/env bash
# Stands for every program of a documented command, under the program's name: appends the call to $CALLS, and does what needs neither a
# cluster nor another host. Fields end with NUL: folder, line of the block, standard input, settings, --, program, arguments, RS.
program=${0##*/} input='' settings=()
[ "$program" != curl ] && { [ -p /dev/stdin ] || [ -f /dev/stdin ]; } && input=$(cat)
for name in ${!PREDICTOR_@} ${!STORAGE_@} ${!MODEL_REFERENCE@} ${!ADAPTER_REFERENCE@}; do settings+=("$name=${!name}"); done
printf '%s\0' "$PWD" "$BLOCK" "$input" "${settings[@]}" -- "$program" "$@" $'\x1e' >> "$CALLS"
case $program in
  curl) exec "$RECORDER_PYTHON" -I -S "$CURL" "$@" ;;
  git) if [ "$1" = clone ]; then clone=${*: -1} && ln -sfn "$CHECKOUT" "$(basename "$clone" .git)"; fi ;;
  kubectl)
    case " $* " in
      " kustomize "*)
        for word; do
          shift
          [[ $word =~ ^(https://)?github\.com/OWNER/REPO(\.git)?//?([^?]*) ]] && word=$CHECKOUT/${BASH_REMATCH[3]}
          set -- "$@" "$word"
        done
        exec "$KUBECTL" "$@"
        ;;
      " create "*--dry-run=client*) exec "$KUBECTL" "$@" ;;
      *jsonpath*url*) echo http://llm.example.com ;;
      *jsonpath*.data*) echo ZXhhbXBsZQ== ;;
      *" -o "*) echo example ;;
    esac
    ;;
  python | python3)
    if [ "${1-} ${2-}" = "-m venv" ]; then mkdir -p "$3" && ln -sfn "$CHECKOUT/.venv/bin" "$3/bin"; fi
    ;;
  nohup | sudo | watch) exec "$@" ;;
esac
