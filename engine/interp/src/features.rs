//! Which optional instruction sets the interpreter has on this host: those that the host runs natively for it.

use iced_x86::CpuidFeature;
use lodger_native::supported;
use lodger_x86::cpu_model::HostFeatures;

/// What a CPU model may offer to a guest of the software engines on this host.
pub fn host_features() -> HostFeatures {
    HostFeatures {
        sse41: supported(CpuidFeature::SSE4_1),
        sse42: supported(CpuidFeature::SSE4_2),
        popcnt: supported(CpuidFeature::POPCNT),
        pclmulqdq: supported(CpuidFeature::PCLMULQDQ),
        aes: supported(CpuidFeature::AES),
        sha: supported(CpuidFeature::SHA),
        avx: supported(CpuidFeature::AVX),
        avx2: supported(CpuidFeature::AVX2),
        fma: supported(CpuidFeature::FMA),
        f16c: supported(CpuidFeature::F16C),
        bmi1: supported(CpuidFeature::BMI1),
        bmi2: supported(CpuidFeature::BMI2),
        lzcnt: supported(CpuidFeature::LZCNT),
        movbe: supported(CpuidFeature::MOVBE),
        adx: supported(CpuidFeature::ADX),
        // The host's generator is behind the clock's door, whatever the host's processor has.
        rdrand: true,
        rdseed: true,
    }
}
