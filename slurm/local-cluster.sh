#!/usr/bin/env bash
# A real Slurm cluster of virtual nodes on one machine, to try alignlab's jobs and to test them. Needs root, and Debian's
# packages, which it installs; no systemd, containers or cgroups. The nodes are slurmd daemons that pretend to have GPUs;
# scheduling, accounting, preemption, time limits and node failures are Slurm's own. See slurm/README.md.
#
#   slurm/local-cluster.sh [start]    install what is missing, configure, start, wait until all nodes are idle
#   slurm/local-cluster.sh stop       cancel the jobs; stop the daemons that this script started
#   slurm/local-cluster.sh wipe       stop, and remove every trace: configuration, database, logs
#   slurm/local-cluster.sh status     nodes and daemons
#   slurm/local-cluster.sh exec CMD   run CMD where node1, node2, ... resolve to 127.0.0.1
#
# Partitions: main (the default; its jobs can be preempted, with 30 s of grace) and high (preempts main). Account:
# research. Settings, by environment variables:
#   ALIGNLAB_SLURM=$TMPDIR/slurm-lab   folder of its state, logs, keys and database; all users must be able to enter it
#   ALIGNLAB_SLURM_CONF=/etc/slurm     folder of its configuration; for another one export SLURM_CONF=FOLDER/slurm.conf
#   ALIGNLAB_SLURM_PORT=16817          first port: slurmctld; +2 slurmdbd, +3 MariaDB, +10+i slurmd of node i
#                                      (with these three a second cluster runs beside the first)
#   ALIGNLAB_SLURM_NODES=2             _GPUS=4  _GPU_TYPE=h100  _CPUS=32  _MEM=256000 (MB)   what each pretends to have
#   ALIGNLAB_SLURM_ACCT=1              0: no database; then sacct, accounts and limits do not work
#   ALIGNLAB_SLURM_NS=auto             1|0: each node has a host name and /etc/hosts of its own (unshare)
#   ALIGNLAB_SLURM_LOOPBACK=auto       1|0: all daemons listen on loopback alone; needs a host name that is 127.0.0.1
set -euo pipefail

LAB=${ALIGNLAB_SLURM:-${TMPDIR:-/tmp}/slurm-lab}
CONF=${ALIGNLAB_SLURM_CONF:-/etc/slurm}
PORT=${ALIGNLAB_SLURM_PORT:-16817}
NODES=${ALIGNLAB_SLURM_NODES:-2}
GPUS=${ALIGNLAB_SLURM_GPUS:-4}
GPU_TYPE=${ALIGNLAB_SLURM_GPU_TYPE:-h100}
CPUS=${ALIGNLAB_SLURM_CPUS:-32}
MEM=${ALIGNLAB_SLURM_MEM:-256000}
ACCT=${ALIGNLAB_SLURM_ACCT:-1}
NS=${ALIGNLAB_SLURM_NS:-auto}
LOOPBACK=${ALIGNLAB_SLURM_LOOPBACK:-auto}
CLUSTER=alignlab ACCOUNT=research
SOCK=$LAB/munge/munge.socket.2
CTLD_PORT=$PORT SLURMD_PORT=$((PORT + 1)) DBD_PORT=$((PORT + 2)) SQL_PORT=$((PORT + 3))
MARK="# written by slurm/local-cluster.sh for $LAB"
export SLURM_CONF=$CONF/slurm.conf
PATH=/usr/sbin:/sbin:$PATH

say() { printf '[local-cluster +%ss] %s\n' "$SECONDS" "$*"; }
die() { say "ERROR: $*" >&2; tail -n 15 "$LAB"/log/*.log >&2 2>/dev/null || true; exit 1; }
running() { # pid; a zombie (PID 1 of a container or microVM may not reap) counts as gone
  [ -r "/proc/$1/stat" ] && ! grep -q '^State:[[:space:]]*[ZX]' "/proc/$1/status" 2>/dev/null; }
alive() { # pidfile, named after its daemon; a pid that now belongs to another program counts as gone
  local n; n=$(basename "$1"); n=${n%%.*}
  [ -s "$1" ] && running "$(cat "$1")" && [ "$(cat "/proc/$(cat "$1")/comm")" = "$n" ]; }
wait_port() { # address port seconds what
  local end=$((SECONDS + $3))
  until (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; do
    [ $SECONDS -lt $end ] || die "$4 did not open $1:$2 within $3 s"; sleep 0.1
  done
}
free_port() { # port pidfile what: somebody else's daemon on our port must not pass for ours
  alive "$2" || ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null || die "port $1 ($3) is taken: another cluster? (ALIGNLAB_SLURM_PORT)"
}
mine() { [ ! -e "$CONF/slurm.conf" ] || grep -qxE "# written by (slurm/local-cluster|start-slurm).sh for $LAB" "$CONF/slurm.conf"; }
stop_pidfile() { # name pidfile
  alive "$2" || { rm -f "$2"; return 0; }
  local p; p=$(cat "$2")
  if kill "$p" 2>/dev/null; then
    for _ in $(seq 100); do running "$p" || break; sleep 0.1; done
    if running "$p"; then say "$1 ($p) did not stop, killing it"; kill -9 "$p" 2>/dev/null || true; fi
  fi
  rm -f "$2"
}

install() {
  local want=(munge slurmctld slurmd slurm-client) need=() p
  # mariadb-server-core (not mariadb-server): no perl upgrade, no service; -client-core has my_print_defaults
  [ "$ACCT" = 1 ] && want+=(slurmdbd mariadb-server-core mariadb-client-core)
  for p in "${want[@]}"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || need+=("$p")
  done
  [ ${#need[@]} -eq 0 ] && return 0
  say "installing ${need[*]}"
  local made=0   # keep the packages from starting services of their own
  if [ ! -e /usr/sbin/policy-rc.d ]; then printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; made=1; fi
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${need[@]}"; } \
    >"$LAB/log/apt.log" 2>&1 || { [ $made = 0 ] || rm -f /usr/sbin/policy-rc.d; die "apt failed, see $LAB/log/apt.log"; }
  [ $made = 0 ] || rm -f /usr/sbin/policy-rc.d
}

# All nodes share 127.0.0.1 and differ by port.  Not 127.0.1.N each: with NoInAddrAny an srun inside a job binds to
# the address of its own hostname, but is called back at the address its connection came from, 127.0.0.1, and hangs.

write_config() {
  local host i comm='' dbdcomm=''; host=$(hostname -s)
  # these options bind to what the host's own name resolves to; in our mount namespace that is 127.0.0.1
  if [ "$NS" = 1 ] || [ "$LOOPBACK" = 1 ]; then comm=CommunicationParameters=NoCtldInAddrAny dbdcomm=CommunicationParameters=NoInAddrAny; fi
  [ "$LOOPBACK" = 0 ] || comm=CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
  # munge: a private key and a private socket
  [ -s "$LAB/munge/munge.key" ] || (umask 077; dd if=/dev/urandom of="$LAB/munge/munge.key" bs=1024 count=1 status=none)
  # job ids that do not start again at 1 after a wipe: submitit would read an old run's results in folder/<job id>
  [ -s "$LAB/first-job" ] || echo $(($(date +%s) % 60000000)) >"$LAB/first-job"
  # fake GPUs: gres.conf wants character devices; links to /dev/null pass (no CAP_MKNOD needed)
  for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$LAB/dev/gpu$i"; done
  # hosts file seen inside the virtual nodes (and by slurmctld)
  { echo "127.0.0.1 localhost $host"
    grep -vE "[[:space:]](node[0-9]+|$host)([[:space:]]|\$)" /etc/hosts || true
    for ((i = 1; i <= NODES; i++)); do echo "127.0.0.1 node$i"; done; } >"$LAB/hosts"

  {
    cat <<EOF
$MARK
ClusterName=$CLUSTER
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$CTLD_PORT
SlurmdPort=$SLURMD_PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$SOCK,cred_expire=5
$comm
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
# believe slurm.conf about CPUs and memory, whatever the machine has (the old FastSchedule=2)
SlurmdParameters=config_overrides
ReturnToService=2
# a node that does not answer for so long is down, and its jobs are queued again (default 300 s)
SlurmdTimeout=20
KillWait=5
MessageTimeout=30
MinJobAge=3600
JobRequeue=1
MaxArraySize=10001
FirstJobId=$(cat "$LAB/first-job")
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
# at a preemption send the job's own --signal, as submitit needs it, not TERM
SlurmctldParameters=preempt_send_user_signal
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt
EOF
    if [ "$ACCT" = 1 ]; then cat <<EOF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$DBD_PORT
# with auth/munge this "password" is the munge socket used towards slurmdbd; AuthInfo is not looked at
AccountingStoragePass=$SOCK
AccountingStorageTRES=gres/gpu
# an account that does not exist is an error
AccountingStorageEnforce=associations
EOF
    else echo AccountingStorageType=accounting_storage/none; fi
    for ((i = 1; i <= NODES; i++)); do
      echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + 10 + i)) Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM Gres=gpu:$GPU_TYPE:$GPUS State=UNKNOWN"
    done
    cat <<EOF
PartitionName=main Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=30 DefaultTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL Default=NO  PriorityTier=10 PreemptMode=OFF     DefaultTime=60 MaxTime=INFINITE State=UP
EOF
  } >"$CONF/slurm.conf"

  cat >"$CONF/gres.conf" <<EOF
AutoDetect=off
NodeName=node[1-$NODES] Name=gpu Type=$GPU_TYPE File=$LAB/dev/gpu[0-$((GPUS - 1))] Flags=nvidia_gpu_env
EOF
  # slurmd 22.05 sets up a cgroup plugin even with proctrack/linuxproc and task/none, and dies where autodetection finds no
  # usable hierarchy (containers, no systemd).  Naming cgroup/v1 touches nothing; newer Slurm has "disabled" for this (not tried).
  case $(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -1) in
    2[0-2].*|23.02) echo CgroupPlugin=cgroup/v1 >"$CONF/cgroup.conf" ;;
    *) echo CgroupPlugin=disabled >"$CONF/cgroup.conf" ;;
  esac

  if [ "$ACCT" = 1 ]; then
    (umask 077; cat >"$CONF/slurmdbd.conf" <<EOF
AuthType=auth/munge
AuthInfo=socket=$SOCK
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$DBD_PORT
$dbdcomm
SlurmUser=root
DebugLevel=info
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$SQL_PORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
EOF
    )
    chmod 600 "$CONF/slurmdbd.conf"
    cat >"$LAB/init.sql" <<'EOF'
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
EOF
  fi
}

in_ns() { # hostname-or-"" command...   own mount (and, with a hostname, UTS) namespace
  local name=$1; shift
  if [ "$NS" = 0 ]; then "$@"; return; fi
  local u=(-m); [ -z "$name" ] || u+=(-u)
  unshare "${u[@]}" bash -c 'mount --bind "$0" /etc/hosts && { [ -z "$1" ] || hostname "$1"; } && shift && exec "$@"' "$LAB/hosts" "$name" "$@"
}

start() {
  [ "$(id -u)" = 0 ] || die "needs root"
  umask 022
  mine || die "$CONF/slurm.conf was not written for $LAB: not touching it (ALIGNLAB_SLURM_CONF)"
  [ "$(cat "$LAB/state/clustername" 2>/dev/null || echo $CLUSTER)" = $CLUSTER ] || die "an older cluster lies in $LAB: wipe it first"
  mkdir -p "$LAB"/{munge,state,spool,log,run,dev} "$CONF"; : >"$LAB/.slurm-lab"
  free_port $CTLD_PORT "$LAB/run/slurmctld.pid" slurmctld
  if [ "$ACCT" = 1 ]; then
    free_port $DBD_PORT "$LAB/run/slurmdbd.pid" slurmdbd; free_port $SQL_PORT "$LAB/run/mariadbd.pid" mariadbd
  fi
  chmod 755 "$LAB" "$LAB/munge"
  install; say "packages present: $(slurmctld -V)"
  if [ "$NS" = auto ]; then
    if unshare -m -u bash -c 'mount --bind /etc/hosts /etc/hosts && hostname probe' 2>/dev/null; then NS=1
    else NS=0; say "no unshare here: node names will not resolve inside jobs, use 127.0.0.1"; fi
  fi
  if [ "$LOOPBACK" = auto ]; then
    local at; at=$({ getent ahostsv4 "$(hostname -s)" || true; } | awk 'NR==1{print $1}')
    if [ "$at" = 127.0.0.1 ]; then LOOPBACK=1
    else LOOPBACK=0; say "$(hostname -s) resolves to '${at:-nothing}', not 127.0.0.1: slurmd and srun will listen on all addresses"; fi
  fi
  write_config

  alive "$LAB/run/munged.pid" || munged --socket="$SOCK" --key-file="$LAB/munge/munge.key" --num-threads=4 \
    --pid-file="$LAB/run/munged.pid" --log-file="$LAB/munge/munged.log" --seed-file="$LAB/munge/munged.seed" \
    || die "munged did not start (it wants every directory above $LAB passable: not /root)"
  munge -S "$SOCK" -n | unmunge -S "$SOCK" >/dev/null || die "munge does not work"

  if [ "$ACCT" = 1 ]; then
    if ! alive "$LAB/run/mariadbd.pid"; then
      local nosync=(--innodb-flush-method=nosync --sync-frm=0 --debug-no-sync --innodb-log-file-size=8M)   # a test database: 0.5 s, not 3
      [ -d "$LAB/mysql/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$LAB/mysql" \
        --auth-root-authentication-method=normal --skip-test-db "${nosync[@]}" \
        >"$LAB/log/mariadb-install.log" 2>&1 || die "mariadb-install-db"
      setsid mariadbd --no-defaults --user=root --datadir="$LAB/mysql" --socket="$LAB/run/mysql.sock" \
        --pid-file="$LAB/run/mariadbd.pid" --bind-address=127.0.0.1 --port=$SQL_PORT --skip-name-resolve \
        --init-file="$LAB/init.sql" --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 "${nosync[@]}" \
        --log-error="$LAB/log/mariadbd.log" </dev/null >/dev/null 2>&1 &
      wait_port 127.0.0.1 $SQL_PORT 60 mariadbd
    fi
    alive "$LAB/run/slurmdbd.pid" || in_ns "" slurmdbd || die "slurmdbd did not start"
    wait_port 127.0.0.1 $DBD_PORT 60 slurmdbd
    say "accounting up"
  fi

  alive "$LAB/run/slurmctld.pid" || in_ns "" slurmctld || die "slurmctld did not start"
  wait_port 127.0.0.1 $CTLD_PORT 60 slurmctld
  local i
  for ((i = 1; i <= NODES; i++)); do
    alive "$LAB/run/slurmd.node$i.pid" || in_ns "node$i" slurmd -N "node$i" || die "slurmd -N node$i did not start (is /sys mounted?)"
  done
  local end=$((SECONDS + 60))
  until [ "$(sinfo -h -N -p main -t idle,mix,alloc -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ]; do
    [ $SECONDS -lt $end ] || { sinfo -N -l; die "nodes did not become idle"; }
    sleep 0.2
  done
  if [ "$ACCT" = 1 ]; then
    local who=${SUDO_USER:-$(id -un)}
    until sacctmgr -n -P list cluster format=cluster 2>/dev/null | grep -qx $CLUSTER; do   # slurmctld registers it
      [ $SECONDS -lt $end ] || die "the cluster did not register with slurmdbd"; sleep 0.2
    done
    sacctmgr -i add account $ACCOUNT cluster=$CLUSTER >/dev/null 2>&1 || true   # it may be there already
    sacctmgr -i add user "$who" account=$ACCOUNT cluster=$CLUSTER >/dev/null 2>&1 || true
    until scontrol show assoc_mgr users="$who" accounts=$ACCOUNT flags=assoc | grep -q "Account=$ACCOUNT UserName=$who"; do
      [ $SECONDS -lt $end ] || die "account $ACCOUNT of $who does not reach slurmctld"; sleep 0.2
    done
  fi
  say "up"; sinfo -N -p main -o '%8N %10T %4c %8m %G'
}

stop() {
  if alive "$LAB/run/slurmctld.pid"; then
    timeout 10 squeue -h -t PD -o %A | xargs -r timeout 10 scancel 2>/dev/null || true
    timeout 10 squeue -h -o %A | xargs -r timeout 10 scancel 2>/dev/null || true
    for _ in $(seq 100); do [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break; sleep 0.2; done
  fi
  local f
  for f in "$LAB"/run/slurmd.*.pid; do [ -e "$f" ] && stop_pidfile slurmd "$f"; done
  stop_pidfile slurmctld "$LAB/run/slurmctld.pid"
  stop_pidfile slurmdbd "$LAB/run/slurmdbd.pid"
  stop_pidfile mariadbd "$LAB/run/mariadbd.pid"
  stop_pidfile munged "$LAB/run/munged.pid"
  say stopped
}

case ${1:-start} in
  start) start ;;
  stop) stop ;;
  wipe)
    stop
    if [ -e "$CONF/slurm.conf" ] && mine; then rm -f "$CONF"/{slurm,gres,cgroup,slurmdbd}.conf; fi
    if [ -e "$LAB/.slurm-lab" ]; then rm -rf "$LAB"; fi
    say wiped ;;
  status) sinfo -N -l || true; for f in "$LAB"/run/*.pid; do echo "$(basename "$f") $(cat "$f") $(alive "$f" && echo up || echo down)"; done ;;
  exec) shift; [ -s "$LAB/hosts" ] || die "not started"; unshare -m true 2>/dev/null || NS=0; in_ns "" "$@" ;;
  *) sed -n '2,/^set -e/{/^#/p}' "$0"; exit 2 ;;
esac
