//! The parts of which the operations are made, one thread each: `cargo bench`. What a whole command takes is measured by
//! `benches/compare`.

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dedup_img::storage::LockMode;
use dedup_img::unstable::{ContentAt, Sequence, Spill, fingerprint, group, is_zero, sha256};
use dedup_img::{CheckOptions, Disk, DiskOptions, Format, Work, WorkOptions, check, open_image};

const CLUSTER: usize = 4096;
/// Fits into the second level cache, as the pieces do that a scan reads.
const PIECE: usize = 256 << 10;
/// Records that are grouped: those of 4 GiB in clusters of 4 KiB.
const RECORDS: u64 = 1 << 20;

/// Bytes without a pattern, always the same.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let word = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ state >> 29).to_be_bytes()
    };
    (0..len / 8).flat_map(word).collect()
}

fn digests(criterion: &mut Criterion) {
    let (zeros, noise) = (vec![0; PIECE], noise(PIECE));
    let mut run = criterion.benchmark_group("digest");
    run.throughput(Throughput::Bytes(PIECE as u64));
    run.bench_function("zero test of zeros", |b| {
        b.iter(|| black_box(&zeros).chunks_exact(CLUSTER).filter(|cluster| is_zero(cluster)).count());
    });
    run.bench_function("fingerprint", |b| {
        b.iter(|| black_box(&noise).chunks_exact(CLUSTER).map(fingerprint).max());
    });
    run.bench_function("SHA-256", |b| {
        b.iter(|| black_box(&noise).chunks_exact(CLUSTER).map(|cluster| sha256(cluster)[0]).fold(0, |a, b| a ^ b));
    });
    let copy = noise.clone();
    run.bench_function("comparison", |b| b.iter(|| black_box(&noise) == black_box(&copy)));
    run.finish();
}

fn grouping(criterion: &mut Criterion) {
    let spill = Spill::new(1 << 30, Path::new("."));
    // Every other record repeats an earlier one.
    let records: Vec<ContentAt> =
        (0..RECORDS).map(|n| ContentAt::new(fingerprint(&(n / 2).to_be_bytes()), n)).collect();
    let mut run = criterion.benchmark_group("grouping");
    run.throughput(Throughput::Elements(RECORDS)).sample_size(20);
    let sequence = || {
        let mut sequence = Sequence::new(&spill);
        sequence.extend(&records).expect("memory");
        sequence
    };
    run.bench_function("sort of records", |b| {
        b.iter_batched(sequence, |s| s.into_sorted().expect("memory"), criterion::BatchSize::LargeInput);
    });
    let sorted = sequence().into_sorted().expect("memory");
    run.bench_function("links of sorted records", |b| {
        b.iter(|| group(&sorted, 1 << 30, &spill).expect("memory").len());
    });
    run.finish();
}

fn tables(criterion: &mut Criterion) {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("image.qcow2");
    // 16 GiB of mapped clusters of 4 KiB, whose data is a hole of the file.
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,preallocation=metadata"])
        .args([path.as_os_str(), "16G".as_ref()])
        .status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("no qemu-img: the tables are not measured");
        return;
    }
    let mut run = criterion.benchmark_group("tables");
    run.throughput(Throughput::Elements((16 << 30) / CLUSTER as u64)).sample_size(20);
    let disk = Disk::open(&path, &DiskOptions::default()).expect("an image");
    let image = disk.qcow2().expect("a QCOW2");
    run.bench_function("walk of L2 tables", |b| {
        let mut scratch = Vec::new();
        b.iter(|| {
            let mut mapped = 0;
            for start in (0..16 << 30).step_by(2 << 20) {
                image.extents(start, 2 << 20, &mut scratch, |extent| mapped += extent.len).expect("sound tables");
            }
            mapped
        });
    });
    let (storage, _) = open_image(&path, Some(Format::Qcow2), LockMode::Read).expect("an image");
    let work = Work::new(WorkOptions { threads: Some(1), ..WorkOptions::default() }).expect("a thread");
    run.bench_function("count of references (check)", |b| {
        b.iter(|| check(&storage, CheckOptions::default(), &work, &mut |_| {}).expect("an image").leaks);
    });
    run.finish();
}

criterion_group!(kernels, digests, grouping, tables);
criterion_main!(kernels);
