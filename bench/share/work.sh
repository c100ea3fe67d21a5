# The guest's work in /srv. Each kind begins with nothing in the guest's caches.
work() {
	echo 3 >/proc/sys/vm/drop_caches
	read -r begin _ </proc/uptime
	sh -c "$2" >/dev/null 2>&1
	read -r end _ </proc/uptime
	echo "WORK $1 $(echo "$begin $end" | awk '{ printf "%.2f", $2 - $1 }')"
}
work write "dd if=/dev/zero of=/srv/big bs=1M count=256"
work read "dd if=/srv/big of=/dev/null bs=1M"
work find "find /srv/tree -type f"
work stat "ls -lR /srv/tree"
work open "find /srv/tree -type f | xargs cat"
work make 'mkdir /srv/new; i=0; while [ $i -lt 1000 ]; do echo x >/srv/new/$i; i=$((i + 1)); done'
work remove "rm -r /srv/new /srv/big"
