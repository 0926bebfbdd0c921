//! qemu-nbd: the image as a network block device, read and written by QEMU's client.

use crate::args;
use crate::request::Request;
use crate::support::qemu;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// A server, ended when it goes out of scope.
struct Server {
    child: Child,
    home: tempfile::TempDir,
}

impl Server {
    /// Exports an image and waits until it can be reached.
    fn start(path: &Path, more: &[&str]) -> Result<Self, String> {
        let home = tempfile::tempdir().map_err(said)?;
        let socket = home.path().join("socket");
        let mut words = args!["-f", "qcow2", "-t", "--discard=unmap", "--detect-zeroes=off", "-k", socket].to_vec();
        words.extend(more.iter().map(std::ffi::OsString::from));
        words.push(path.into());
        let mut child = qemu::spawn("qemu-nbd", words);
        let begun = Instant::now();
        while !socket.exists() {
            if let Some(status) = child.try_wait().map_err(said)? {
                return Err(format!("qemu-nbd ended with {status}"));
            }
            if begun.elapsed() > Duration::from_secs(30) {
                return Err("qemu-nbd does not listen".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { child, home })
    }

    fn address(&self) -> String {
        format!("nbd+unix:///?socket={}", self.home.path().join("socket").display())
    }

    /// What `last` gives, after which the server is ended as a user does and has closed the image.
    fn end_after<T>(mut self, last: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        let result = last()?;
        qemu::run("kill", args!["-TERM", self.child.id().to_string()]).ok();
        self.child.wait().map_err(said)?;
        Ok(result)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a snapshot, which the server exports instead of the disk.
pub(crate) fn read_snapshot(path: &Path, id: &str) -> Result<Vec<u8>, String> {
    export(path, &["-r", "-l", &format!("snapshot.id={id}")])
}

/// Reads the disk.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    export(path, &["-r"])
}

/// All that a server with these options gives.
fn export(path: &Path, options: &[&str]) -> Result<Vec<u8>, String> {
    let server = Server::start(path, options)?;
    let copy = server.home.path().join("copy");
    qemu::img(args!["convert", "-f", "raw", "-O", "raw", server.address(), copy]).ok();
    server.end_after(|| fs::read(&copy).map_err(said))
}

/// Writes to the disk.
pub(crate) fn write(path: &Path, requests: &[Request]) -> Result<(), String> {
    let server = Server::start(path, &[])?;
    let mut words = args!["-f", "raw", "-d", "unmap"].to_vec();
    for (n, request) in requests.iter().enumerate() {
        let command = match request {
            Request::Write(at, bytes) => {
                let piece = server.home.path().join(n.to_string());
                fs::write(&piece, bytes).map_err(said)?;
                format!("write -s {} {at} {}", piece.display(), bytes.len())
            }
            Request::Zeros(at, length) => format!("write -z -u {at} {length}"),
        };
        words.extend(args!["-c", command]);
    }
    words.extend(args!["-c", "flush", server.address()]);
    let ran = qemu::run("qemu-io", words).ok();
    assert!(!ran.text().contains("failed"), "{}", ran.told());
    server.end_after(|| Ok(()))
}

/// What an error says.
fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}
