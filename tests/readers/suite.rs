//! Other people's readers and writers of QCOW2, against what dedup-img makes. README.md beside this file has the tables; the
//! tests fail where they are not true.

mod agree;
mod images;
mod nbd;
mod programs;
mod request;
mod support;
mod tables;
