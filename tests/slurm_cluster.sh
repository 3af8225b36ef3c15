#!/bin/sh
# A Slurm cluster of two nodes on this machine, in a folder of its own: real munged, slurmctld and two slurmd.
#     tests/slurm_cluster.sh start FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf
#     tests/slurm_cluster.sh node  FOLDER n1   starts one node's slurmd (again)
#     tests/slurm_cluster.sh stop  FOLDER
# Needs Debian's slurm-wlm and munge. The ports are 17000 to 17002; the nodes have one CPU each.
set -eu
export PATH="$PATH:/usr/sbin:/sbin"
folder=$2
export SLURM_CONF="$folder/slurm.conf"
case $1 in
start)
    mkdir -p "$folder/state"
    chmod 755 "$folder"
    cat > "$SLURM_CONF" <<EOF
ClusterName=focalcal
SlurmctldHost=localhost
SlurmctldPort=17000
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SlurmdTimeout=5
KillWait=5
ReturnToService=2
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost Port=17001 CPUs=1 RealMemory=8000
NodeName=n2 NodeHostname=localhost Port=17002 CPUs=1 RealMemory=8000
PartitionName=tiny Nodes=n1,n2 Default=YES MaxTime=60 State=UP
EOF
    head -c 1024 /dev/urandom > "$folder/munge.key"
    chmod 600 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld -f "$SLURM_CONF"
    slurmd -N n1 -f "$SLURM_CONF"
    slurmd -N n2 -f "$SLURM_CONF"
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --states=idle --format=%D 2> "$folder/sinfo.err")" = 2 ] && exit 0
        sleep 0.5
    done
    echo "The nodes did not come up; logs are in $folder." >&2
    exit 1
    ;;
node)
    slurmd -N "$3" -f "$SLURM_CONF"
    ;;
stop)
    for process in slurmd-n1 slurmd-n2 slurmctld munged; do
        [ -f "$folder/$process.pid" ] && kill "$(cat "$folder/$process.pid")" || true
    done
    ;;
esac
