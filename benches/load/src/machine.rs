//! What the kernel knows: cores, descriptors, and what a process has used.

use std::{
    collections::HashMap,
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    fd::OwnedFd,
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity},
};

use crate::Failure;

/// A core that a thread can be pinned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Core(pub(crate) usize);

/// The proxy's core, and that of the generator and the upstream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    pub(crate) proxy: Core,
    pub(crate) load: Core,
}

impl Cores {
    /// The last two that this process may use: the first one has the machine's interrupts more often.
    pub(crate) fn find() -> Result<Self, Failure> {
        let allowed = sched_getaffinity(None)?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).map(Core).rev();
        match (cores.next(), cores.next()) {
            (Some(proxy), Some(load)) => Ok(Self { proxy, load }),
            _ => Err("the bench needs two cores: one for the proxy, one for the load".into()),
        }
    }
}

/// Keeps this thread, and the processes that it will start, on one core.
pub(crate) fn pin(core: Core) -> Result<(), Failure> {
    let mut set = CpuSet::new();
    set.set(core.0);
    Ok(sched_setaffinity(None, &set)?)
}

/// Puts this thread, and what it will start, before whatever has a lower priority of this kind or
/// none, like everything else on the machine. Whether it may: root may.
///
/// By the program, since the call takes `unsafe` code or a library for it.
pub(crate) fn precede(priority: u8) -> bool {
    let thread = gettid().as_raw_nonzero().to_string();
    let status = Command::new("chrt")
        .args(["--rr", "--pid", &priority.to_string(), &thread])
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// Waits for events; none when the time is up or a signal came.
pub(crate) fn wait(
    epoll: &OwnedFd,
    events: &mut Vec<epoll::Event>,
    timeout: Option<&Timespec>,
) -> Result<(), Failure> {
    match epoll::wait(epoll, rustix::buffer::spare_capacity(events), timeout) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lets this process and its children open as many descriptors as it may.
pub(crate) fn raise_descriptors(needed: u64) -> Result<(), Failure> {
    let limit = getrlimit(Resource::Nofile);
    if limit.maximum.is_some_and(|maximum| maximum < needed) {
        return Err(format!("the bench needs {needed} descriptors: raise `ulimit -Hn`").into());
    }
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// A process and all of its descendants.
#[derive(Debug)]
pub(crate) struct Tree(Vec<u32>);

impl Tree {
    pub(crate) fn of(root: u32) -> Result<Self, Failure> {
        let mut children = HashMap::<u32, Vec<u32>>::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A process that has just ended has no children here.
            if let Some(parent) = read(format!("/proc/{pid}/stat")).and_then(|stat| parent(&stat)) {
                children.entry(parent).or_default().push(pid);
            }
        }
        let mut tree = vec![root];
        let mut next = 0;
        while let Some(pid) = tree.get(next) {
            tree.extend(children.remove(pid).unwrap_or_default());
            next += 1;
        }
        Ok(Self(tree))
    }

    /// How long its threads have run, user and system time.
    ///
    /// The scheduler's own sum in nanoseconds: `utime` and `stime` of `/proc/PID/stat` are the
    /// same sum, split in two and cut to hundredths of a second. A thread that ends between two
    /// readings would be missed, but none of the proxies ends a thread under load.
    pub(crate) fn cpu(&self) -> Result<Duration, Failure> {
        self.cpu_of(None)
    }

    /// The same of the threads of that name alone.
    pub(crate) fn cpu_of(&self, thread: Option<&str>) -> Result<Duration, Failure> {
        let mut nanoseconds = 0;
        for pid in &self.0 {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                let path = task?.path();
                if let Some(name) = thread
                    && fs::read_to_string(path.join("comm"))?.trim_end() != name
                {
                    continue;
                }
                let text = fs::read_to_string(path.join("schedstat"))?;
                let first = text.split_ascii_whitespace().next().and_then(|n| n.parse().ok());
                nanoseconds += first.unwrap_or(0);
            }
        }
        if nanoseconds == 0 {
            return Err("this kernel counts no CPU time in /proc/PID/task/TID/schedstat".into());
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// KiB of memory that it has in RAM.
    pub(crate) fn resident(&self) -> Result<u64, Failure> {
        let mut sum = 0;
        for pid in &self.0 {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let number = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok());
            sum += number.unwrap_or(0);
        }
        Ok(sum)
    }
}

fn read(path: String) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The parent in a line of `/proc/PID/stat`: the second field after the name, which may itself
/// hold spaces and parentheses.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Asks again every few milliseconds until there is an answer.
pub(crate) fn until<T>(
    what: &str,
    patience: Duration,
    mut ask: impl FnMut() -> Option<T>,
) -> Result<T, Failure> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            return Err(format!("{what}: not within {} s", patience.as_secs()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The model of the processor, for the reader's feeling.
pub(crate) fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let model = line.and_then(|line| line.split_once(':')).map_or("", |(_, model)| model);
    format!(
        "{} cores, {}",
        std::thread::available_parallelism().map_or(0, usize::from),
        model.trim()
    )
}

/// Name and release of the kernel.
pub(crate) fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("Linux {}", release.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_found_behind_any_name() {
        assert_eq!(parent("7 (a) b (c) S 4711 7 7 0"), Some(4711));
        assert_eq!(parent("7 (nginx) S 1 7"), Some(1));
        assert_eq!(parent(""), None);
    }

    #[test]
    fn this_process_runs_in_memory() {
        let tree = Tree::of(std::process::id()).unwrap();
        assert!(tree.cpu().unwrap() > Duration::ZERO);
        assert!(tree.resident().unwrap() > 0);
    }
}
